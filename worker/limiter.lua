-- The shared rate limit of one project: GCRA with reservation. Each permit is a slot in time,
-- 1/rate apart; a caller reserves the next few slots and makes its calls when they come.
--
-- KEYS[1]: HASH
--   tat                 ms of the next free slot; like all times here by the server's clock
--   at                  ms of the last look
--   since               ms since when calls have gone without a break
--   sent, refused       calls since then
--   rate, cut           calls/s left by the last cut, and ms of it
--   plateau, top        calls/s that are known to be borne, and that were refused; like the other
--                       two absent once the limit was reached again
--   stray               ms of the last refusal at the limit that led to no cut
-- ARGV: 'reserve', limit (calls/s), burst, permits, ms that a reservation reaches at most, ms ahead
--         from which on nothing is reserved, ms by which the caller's last slots were used late
--       'try', limit (calls/s), burst
--       'throttle', limit (calls/s), ms to pause, ms since the refused call was sent, aim (share of
--         what the cloud bears that is made use of)
-- Returns for 'reserve': ms until the first slot (negative: it has passed), ms between slots, how
-- many slots; for 'try': 0 if a slot was free and is taken, else ms until one is; for 'throttle':
-- ms until the next slot, ms between slots; all as text, since numbers would lose their fraction.

-- A cut leaves no less than this share of the rate, nor of the limit.
local CUT, FLOOR = 0.5, 0.02
-- What is left of the rate by a single refusal after long: a little too much was tried.
local EASE = 0.97
-- A refusal speaks of a second's calls: quotas are given in calls a second.
local SAMPLE_MS = 1000
-- One refusal in so long, with the rate at the limit, is no more than a call that came early.
local STRAY_MS = 60000
-- Seconds in which the rate doubles up to the plateau; and from there the scale of CUBIC: fast away
-- from the top, slow near it, since each probe of a quota costs a refusal.
local DOUBLING_S, PROBE_S = 2, 200

local time = redis.call('TIME')
local now = time[1] * 1000 + time[2] / 1000
local limit = tonumber(ARGV[2])
local state = redis.call('HMGET', KEYS[1], 'tat', 'at', 'since', 'sent', 'refused', 'rate',
  'plateau', 'cut', 'stray', 'top')
-- When the clock was set back, what lies ahead goes back with it.
local back = math.max(0, tonumber(state[2] or now) - now)
local tat = tonumber(state[1] or 0) - back
local since = tonumber(state[3] or now) - back
local sent, refused = tonumber(state[4] or 0), tonumber(state[5] or 0)
local base = tonumber(state[6] or limit)
local plateau = math.min(limit, tonumber(state[7] or limit))
local cut = state[8] and tonumber(state[8]) - back
local stray = tonumber(state[9] or 0) - back
local top = math.min(limit, tonumber(state[10] or limit))

local rate = limit
if cut then
  local seconds = math.max(0, now - cut) / 1000
  rate = base * 2 ^ (seconds / DOUBLING_S)
  if rate >= plateau then
    seconds = seconds - DOUBLING_S * math.log(plateau / base) / math.log(2)
    local level_s = PROBE_S * (math.max(0, top - plateau) / limit) ^ (1 / 3)
    rate = math.min(limit, top + limit * ((seconds - level_s) / PROBE_S) ^ 3)
  end
end
if rate >= limit then cut = nil end

local function start_anew(at)
  since, sent, refused = at, 0, 0
end

local interval = 1000 / rate
-- An idle time earns at most a burst of slots that have passed already.
local earned = 0
local answer
if ARGV[1] == 'throttle' then
  local pause, sent_at = tonumber(ARGV[3]), now - ARGV[4]
  local resumed = now + pause
  -- What was sent before the last cut says nothing of the rate after it.
  if sent_at >= since then
    refused = refused + 1
    local seconds = (sent_at - since) / SAMPLE_MS
    -- Slots that were reserved but come after it say nothing.
    local asked = sent - math.max(0, math.floor((tat - sent_at) / interval + 0.5) - 1)
    local closed = refused >= asked
    if pause > 0 or (seconds >= 1 and (closed or refused > 1)) then
      -- What was borne: the share that was not refused, but for one that may be a stray; or as many
      -- calls as a second's quota had room for, when it ran out sooner.
      local borne = closed and 0 or math.min(1, seconds, 1 - (refused - 1) / asked)
      if borne == 1 and not cut and now - stray > STRAY_MS then
        stray = now
      else
        if borne < CUT then
          base = math.max(limit * FLOOR, rate * CUT)
        else
          base = math.max(limit * FLOOR, rate * (borne < 1 and borne * ARGV[5] or EASE))
          plateau, top = base, rate
        end
        cut = resumed
        interval = 1000 / base
      end
      start_anew(resumed)
    end
  end
  if pause > 0 and resumed > since then start_anew(resumed) end
  tat = math.max(tat, resumed)
  answer = { string.format('%.3f', tat - now), string.format('%.6f', interval) }
else
  earned = (ARGV[3] - 1) * interval
  if tat < now - earned - SAMPLE_MS then start_anew(now) end
  local put_off = ARGV[1] == 'reserve' and tonumber(ARGV[7]) or 0
  tat = math.max(tat + put_off, now - earned)
  local permits = 0
  if ARGV[1] == 'reserve' then
    if tat - now <= tonumber(ARGV[6]) then
      permits = math.max(1, math.min(tonumber(ARGV[4]), math.floor(ARGV[5] / interval)))
    end
    answer = {
      string.format('%.3f', tat - now), string.format('%.6f', interval), tostring(permits),
    }
  elseif tat <= now then
    permits = 1
    answer = { '0' }
  else
    -- Never rounded to 0, which would be a permit.
    answer = { string.format('%.3f', math.max(0.001, tat - now)) }
  end
  tat = tat + permits * interval
  sent = sent + permits
end

redis.call('HSET', KEYS[1], 'tat', string.format('%.3f', tat), 'at', string.format('%.3f', now),
  'since', string.format('%.3f', since), 'sent', sent, 'refused', refused,
  'stray', string.format('%.3f', stray))
if cut then
  redis.call('HSET', KEYS[1], 'rate', string.format('%.6f', base),
    'plateau', string.format('%.6f', plateau), 'top', string.format('%.6f', top),
    'cut', string.format('%.3f', cut))
elseif state[8] then
  redis.call('HDEL', KEYS[1], 'rate', 'plateau', 'top', 'cut')
end
-- Forgotten when idle: by then it would be back at the limit, unless paused for longer, and would
-- have earned its burst.
redis.call('PEXPIRE', KEYS[1], math.ceil(math.max(0, tat - now) + earned + 3600000))
return answer
