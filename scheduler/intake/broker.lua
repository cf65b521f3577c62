-- Messages between their queue and their acknowledgement. All times are the server's, in ms.
-- KEYS[1]: HASH tag -> a message that somebody holds   KEYS[2]: ZSET tags, by the ms when heard of
-- KEYS[3...]: the queue's LISTs by priority; what is taken next is on the right
-- A message that was swept lies in its LIST and HASH behind a head that says how often. Only swept
-- messages have one: what a sender puts there begins with a brace, or is no message.
-- ARGV: 'take', a new tag -> the message, how often it was swept; none: there is none
--       'renew', tags of the messages that the caller holds
--       'restore', tag: at the end of the queue
--       'sweep', ms that nobody was heard of, how many at most: they are taken next; those that
--       were swept before, behind the others, which they may have held up
local time = redis.call('TIME')
local NOW = time[1] * 1000 + math.floor(time[2] / 1000)
local HELD, HEARD = KEYS[1], KEYS[2]
local operation = ARGV[1]

local function parted(message)
  local count, rest = string.match(message, '^swept:(%d+):(.*)$')
  if count then
    return rest, tonumber(count)
  end
  return message, 0
end

local function release(tag)
  local message = redis.call('HGET', HELD, tag)
  redis.call('ZREM', HEARD, tag)
  redis.call('HDEL', HELD, tag)
  return message
end

if operation == 'take' then
  for number = 3, #KEYS do
    local message = redis.call('RPOP', KEYS[number])
    if message then
      redis.call('HSET', HELD, ARGV[2], message)
      redis.call('ZADD', HEARD, NOW, ARGV[2])
      return {parted(message)}
    end
  end
  return false
elseif operation == 'renew' then
  for number = 2, #ARGV do
    redis.call('ZADD', HEARD, 'XX', NOW, ARGV[number])
  end
  return 0
elseif operation == 'restore' then
  local message = release(ARGV[2])
  if message then
    redis.call('LPUSH', KEYS[3], message)
  end
  return 0
elseif operation == 'sweep' then
  local bound = NOW - ARGV[2]
  for _, tag in ipairs(redis.call('ZRANGEBYSCORE', HEARD, '-inf', bound, 'LIMIT', 0, ARGV[3])) do
    local message = release(tag)
    if message then
      local rest, count = parted(message)
      local push = count == 0 and 'RPUSH' or 'LPUSH'
      redis.call(push, KEYS[3], 'swept:' .. count + 1 .. ':' .. rest)
    end
  end
  return 0
end
return redis.error_reply('no such operation: ' .. operation)
