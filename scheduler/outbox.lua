-- Notices on their way. All times are the server's, in ms.
-- KEYS[1]: HASH id -> JSON: notice (a JSON text), channel (where it goes; before there was one, the
--   id's beginning), attempts, first (when the first was made)
-- KEYS[2]: ZSET the same ids, by when they are sent next, or their lease runs out
-- KEYS[3]: ZSET ids ever posted, by when that or their end was: the memory against sending twice
-- KEYS[4]: LIST notices given up
-- ARGV: 'post', ms that an id is remembered, id, notice, channel -> 1, or 0 if it was posted before
--       'claim', ms of the lease, how many at most
--         -> for each: id, notice, attempts with this one, ms since the first, channel
--       'sent', ms that an id is remembered, id -> 1
--       'retry', ms to wait, id, attempts -> 1, or 0 if it was claimed again since
--       'give_up', ms that an id is remembered, id, attempts, record, how many are kept
--         -> 1, or 0 if it was claimed again since
local time = redis.call('TIME')
local NOW = time[1] * 1000 + math.floor(time[2] / 1000)
local NOTICES, DUE, POSTED, UNDELIVERED = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local operation, id = ARGV[1], ARGV[3]

local function remember(memory_ms)
  redis.call('ZREMRANGEBYSCORE', POSTED, '-inf', NOW - memory_ms)
  redis.call('ZADD', POSTED, NOW, id)
  redis.call('PEXPIRE', POSTED, memory_ms)
end

-- An attempt whose lease ran out, and that was made again by another, has no say any more.
local function is_latest_attempt()
  local text = redis.call('HGET', NOTICES, id)
  return text and cjson.decode(text).attempts == tonumber(ARGV[4])
end

local function remove()
  redis.call('HDEL', NOTICES, id)
  redis.call('ZREM', DUE, id)
end

if operation == 'post' then
  local posted_at = redis.call('ZSCORE', POSTED, id)
  if posted_at and tonumber(posted_at) > NOW - ARGV[2] then return 0 end
  if redis.call('HEXISTS', NOTICES, id) == 1 then return 0 end
  redis.call('HSET', NOTICES, id, cjson.encode({ notice = ARGV[4], channel = ARGV[5], attempts = 0 }))
  redis.call('ZADD', DUE, NOW, id)
  remember(ARGV[2])
  return 1
elseif operation == 'claim' then
  local claimed = {}
  for _, due in ipairs(redis.call('ZRANGEBYSCORE', DUE, '-inf', NOW, 'LIMIT', 0, ARGV[3])) do
    local text = redis.call('HGET', NOTICES, due)
    if text then
      local entry = cjson.decode(text)
      entry.attempts = entry.attempts + 1
      entry.first = entry.first or NOW
      redis.call('HSET', NOTICES, due, cjson.encode(entry))
      redis.call('ZADD', DUE, 'XX', NOW + ARGV[2], due)
      local channel = entry.channel or string.match(due, '^[^|]*')
      for _, part in ipairs({ due, entry.notice, entry.attempts, NOW - entry.first, channel }) do
        claimed[#claimed + 1] = part
      end
    else
      redis.call('ZREM', DUE, due) -- Redis lost it
    end
  end
  return claimed
elseif operation == 'sent' then
  -- Whoever else may have claimed it meanwhile: it has arrived.
  remove()
  remember(ARGV[2])
  return 1
elseif operation == 'retry' then
  if not is_latest_attempt() then return 0 end
  redis.call('ZADD', DUE, 'XX', NOW + ARGV[2], id)
  return 1
elseif operation == 'give_up' then
  if not is_latest_attempt() then return 0 end
  remove()
  remember(ARGV[2])
  redis.call('LPUSH', UNDELIVERED, ARGV[5])
  redis.call('LTRIM', UNDELIVERED, 0, ARGV[6] - 1)
  return 1
end
return redis.error_reply('no such operation: ' .. operation)
