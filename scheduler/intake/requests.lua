-- Requests that wait to be planned. All times are the server's, in ms.
-- KEYS[1]: HASH run id -> request   KEYS[2]: ZSET run ids by when they are due
-- KEYS[3]: HASH run id -> how often its planning was begun and came to no end
-- KEYS[4]: HASH run id -> why it could not be planned yet
-- KEYS[5], with 'accept' and an idempotency key: STRING run id and digest
-- ARGV: 'accept', run id, request, digest of its content, ms that the key is remembered
--         -> run id and digest of the request that the key stands for: this one or an earlier
--       'take', ms of the lease, how many at most -> for each: run id, request, times tried
--       'renew', ms of the lease, run id
--       'retry', ms to wait, run id, why ('': as before)
--       'done', run id
local time = redis.call('TIME')
local NOW = time[1] * 1000 + math.floor(time[2] / 1000)
local REQUESTS, DUE, TRIED, TROUBLE = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local operation = ARGV[1]

if operation == 'accept' then
  local run_id, digest = ARGV[2], ARGV[4]
  if KEYS[5] then
    local known = redis.call('GET', KEYS[5])
    if known then return known end
    redis.call('SET', KEYS[5], run_id .. ' ' .. digest, 'PX', ARGV[5])
  end
  redis.call('HSET', REQUESTS, run_id, ARGV[3])
  redis.call('ZADD', DUE, NOW, run_id)
  return run_id .. ' ' .. digest
elseif operation == 'take' then
  local taken = {}
  for _, run_id in ipairs(redis.call('ZRANGEBYSCORE', DUE, '-inf', NOW, 'LIMIT', 0, ARGV[3])) do
    local request = redis.call('HGET', REQUESTS, run_id)
    if request then
      redis.call('ZADD', DUE, NOW + ARGV[2], run_id)
      for _, part in ipairs({ run_id, request, redis.call('HINCRBY', TRIED, run_id, 1) }) do
        taken[#taken + 1] = part
      end
    else
      redis.call('ZREM', DUE, run_id)
    end
  end
  return taken
elseif operation == 'renew' then
  return redis.call('ZADD', DUE, 'XX', NOW + ARGV[2], ARGV[3])
elseif operation == 'retry' then
  redis.call('HDEL', TRIED, ARGV[3])
  if ARGV[4] ~= '' and redis.call('HEXISTS', REQUESTS, ARGV[3]) == 1 then
    redis.call('HSET', TROUBLE, ARGV[3], ARGV[4])
  end
  return redis.call('ZADD', DUE, 'XX', NOW + ARGV[2], ARGV[3])
elseif operation == 'done' then
  redis.call('ZREM', DUE, ARGV[2])
  redis.call('HDEL', TRIED, ARGV[2])
  redis.call('HDEL', TROUBLE, ARGV[2])
  return redis.call('HDEL', REQUESTS, ARGV[2])
end
return redis.error_reply('no such operation: ' .. operation)
