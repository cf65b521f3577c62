-- A lock with an owner. ARGV: 'lead', name, ttl in ms; or 'resign', name.
-- Returns 1 if the name held it, or took it since nobody did.
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[2] then return 0 end
if ARGV[1] == 'lead' then
  redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
elseif holder then
  redis.call('DEL', KEYS[1])
end
return 1
