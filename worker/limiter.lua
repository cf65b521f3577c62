-- The shared rate limit of one project: GCRA with reservation. Each permit is a slot in time,
-- 1/rate apart; a caller reserves the next few slots and makes its calls when they come.
-- KEYS[1]: HASH tat (ms of the next free slot), rate (calls/s), at (ms of the last look),
--   cut (ms of the last cut). The clock is the server's.
-- ARGV: 'reserve', limit (calls/s), recovery (share of the limit a second), permits, burst,
--         ms that a reservation reaches at most
--       'try', limit (calls/s), recovery (share of the limit a second), burst
--       'throttle', limit, recovery, factor, cooldown ms, pause ms, floor (share of the limit)
-- Returns for 'reserve': ms until the first slot (negative: it has passed), ms between slots, how
-- many slots; for 'try': 0 if a slot was free and is taken, else ms until one is; for 'throttle':
-- the rate after it; all as text, since numbers would lose their fraction.
local time = redis.call('TIME')
local now = time[1] * 1000 + time[2] / 1000
local limit, recovery = tonumber(ARGV[2]), tonumber(ARGV[3])
local state = redis.call('HMGET', KEYS[1], 'tat', 'rate', 'at', 'cut')
local tat, at, cut = tonumber(state[1] or 0), tonumber(state[3] or now), tonumber(state[4] or 0)
-- When the clock was set back, what lies ahead goes back with it.
local back = math.max(0, at - now)
tat, at, cut = tat - back, at - back, cut - back
-- Additive recovery, worked out when somebody looks.
local rate = math.min(limit, tonumber(state[2] or limit) + limit * recovery * (now - at) / 1000)
local interval = 1000 / rate
-- An idle time earns at most a burst of slots that have passed already.
local earned = 0
local answer
if ARGV[1] == 'reserve' then
  local permits = math.max(1, math.min(tonumber(ARGV[4]), math.floor(ARGV[6] / interval)))
  earned = (ARGV[5] - 1) * interval
  tat = math.max(tat, now - earned)
  answer = { string.format('%.3f', tat - now), string.format('%.6f', interval), tostring(permits) }
  tat = tat + permits * interval
elseif ARGV[1] == 'try' then
  earned = (ARGV[4] - 1) * interval
  tat = math.max(tat, now - earned)
  if tat <= now then
    answer = { '0' }
    tat = tat + interval
  else
    -- Never rounded to 0, which would be a permit.
    answer = { string.format('%.3f', math.max(0.001, tat - now)) }
  end
else
  -- Many calls in flight are refused at once for one excess: they cut the rate once.
  if now - cut >= tonumber(ARGV[5]) then
    rate = math.max(limit * ARGV[7], rate * ARGV[4])
    cut = now
  end
  tat = math.max(tat, now + ARGV[6])
  answer = { string.format('%.6f', rate) }
end
redis.call('HSET', KEYS[1], 'tat', string.format('%.3f', tat), 'rate', string.format('%.6f', rate),
  'at', string.format('%.3f', now), 'cut', string.format('%.3f', cut))
-- Forgotten when idle: by then it would be back at the limit, unless paused for longer, and would
-- have earned its burst.
redis.call('PEXPIRE', KEYS[1], math.ceil(math.max(0, tat - now) + earned + 3600000))
return answer
