-- Messages between their queue and their acknowledgement. All times are the server's, in ms.
-- KEYS[1]: HASH tag -> a message that somebody holds   KEYS[2]: ZSET tags, by the ms when heard of
-- KEYS[3...]: the queue's LISTs by priority; what is taken next is on the right
-- ARGV: 'take', a new tag -> the message; none: there is none
--       'renew', tags of the messages that the caller holds
--       'restore', tag: at the end of the queue
--       'sweep', ms that nobody was heard of, how many at most: they are taken next
local time = redis.call('TIME')
local NOW = time[1] * 1000 + math.floor(time[2] / 1000)
local HELD, HEARD = KEYS[1], KEYS[2]
local operation = ARGV[1]

local function restore(tag, push)
  local message = redis.call('HGET', HELD, tag)
  redis.call('ZREM', HEARD, tag)
  redis.call('HDEL', HELD, tag)
  if message then
    redis.call(push, KEYS[3], message)
  end
end

if operation == 'take' then
  for number = 3, #KEYS do
    local message = redis.call('RPOP', KEYS[number])
    if message then
      redis.call('HSET', HELD, ARGV[2], message)
      redis.call('ZADD', HEARD, NOW, ARGV[2])
      return message
    end
  end
  return false
elseif operation == 'renew' then
  for number = 2, #ARGV do
    redis.call('ZADD', HEARD, 'XX', NOW, ARGV[number])
  end
  return 0
elseif operation == 'restore' then
  restore(ARGV[2], 'LPUSH')
  return 0
elseif operation == 'sweep' then
  local bound = NOW - ARGV[2]
  for _, tag in ipairs(redis.call('ZRANGEBYSCORE', HEARD, '-inf', bound, 'LIMIT', 0, ARGV[3])) do
    restore(tag, 'RPUSH')
  end
  return 0
end
return redis.error_reply('no such operation: ' .. operation)
