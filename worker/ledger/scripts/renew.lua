-- Prolongs leases. ARGV: owner, lease in ms, number, ... Returns the numbers no longer owned.
local lost = {}
for i = 3, #ARGV do
  local n = ARGV[i]
  local job = read(n)
  if job and job.state == 'leased' and job.owner == ARGV[1] then
    redis.call('ZADD', LEASED, NOW + ARGV[2], n)
  else
    lost[#lost + 1] = n
  end
end
settle_counts()
return lost
