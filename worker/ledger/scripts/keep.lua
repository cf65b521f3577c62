-- Notes pools that the plan of a run keeps, while the run is being created.
-- ARGV: how many are noted already, record, ... Noting the same again changes nothing.
-- Returns the number noted then, or -1 if the run takes no more.
if run.state ~= 'creating' then return -1 end
if redis.call('LLEN', KEYS[13]) == tonumber(ARGV[1]) then
  for i = 2, #ARGV do redis.call('RPUSH', KEYS[13], ARGV[i]) end
end
return redis.call('LLEN', KEYS[13])
