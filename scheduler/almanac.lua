-- What the leader writes of a policy's nights, all of it or nothing.
-- KEYS: the lead, the last nights, the policy's past nights.
-- ARGV: who writes, the policy, how many past nights are kept, its last night (empty: forget it),
-- and the nights that are past now, oldest first. Returns 0 if the writer does not lead any more.
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
-- Written already: the answer was lost on its way, and the writer asks again.
if redis.call('HGET', KEYS[2], ARGV[2]) == ARGV[4] then return 1 end
if ARGV[4] == '' then
  redis.call('HDEL', KEYS[2], ARGV[2])
else
  redis.call('HSET', KEYS[2], ARGV[2], ARGV[4])
end
for number = 5, #ARGV do redis.call('LPUSH', KEYS[3], ARGV[number]) end
if #ARGV > 4 then redis.call('LTRIM', KEYS[3], 0, ARGV[3] - 1) end
return 1
