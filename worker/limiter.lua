-- The shared rate limit of one project: GCRA with reservation. Each permit is a slot in time,
-- 1/rate apart; a caller reserves the next few slots and makes its calls when they come.
--
-- KEYS[1]: HASH
--   tat                 ms of the next free slot; like all times here by the server's clock
--   at                  ms of the last look
--   since               ms since when calls have gone without a break; ahead for a while after a cut
--   sent, refused       calls since then
--   rate, cut           calls/s left by the last cut, and ms of it
--   plateau             calls/s that are known to be borne; like the other two absent once the
--                       limit was reached again
--   hold                s that the plateau is kept before more is tried
--   stray               ms of the last refusal at the limit that led to no cut
--   slot, void          number of the next free slot, and of the first that no pause took back
--   looked, later       slots given since it was last seen whether all come later than they are
--                       due, and ms by which the most punctual of them does
-- KEYS[2]: HASH
--   number of a slot -> ms before which the slot a second's calls after it may not come, since it
--                       was used late
-- ARGV: 'reserve', limit (calls/s), aim (share of what the cloud bears that is made use of), burst,
--         permits, ms that a reservation reaches at most, ms ahead from which on nothing is reserved
--       'try', limit (calls/s), aim, burst
--       'late', limit (calls/s), aim, ms that a reservation reaches at most, number of a slot, when it
--         was due, ms by which it was used later, number ...
--       'check', limit (calls/s), aim, numbers of slots that were reserved longer ago
--       'throttle', limit (calls/s), aim, ms to pause, ms since the refused call's slot, ms that a
--         reservation reaches at most
-- Returns for 'reserve': the clock, when the first slot is due, ms between slots, the number of the
-- first, and for each slot ms before which it may not come, or nothing; for 'check': the same for
-- each, 'inf' if a pause took it back; for 'try': 0 if a slot was free and is taken, else ms until one
-- is; for 'throttle': ms until the next slot, ms between slots; all as text, since numbers would lose
-- their fraction.

-- What a closed door leaves of the rate, and what a measured cut leaves at least; and of the limit.
local CUT, LEAST, FLOOR = 0.5, 0.25, 0.02
-- What is left of the rate by a single refusal after long: a little too much was tried.
local EASE = 0.97
-- When less than this share was borne, the quota is another one.
local NEWS = 0.9
-- What follows a late call is put off by a little more, since clocks are not exact.
local MARGIN_MS = 0.5
-- The sequence as a whole is put off by no more at once.
local MOST_LATER_MS = 100
-- Lua cannot hand over many more arguments at once.
local MOST_PERMITS = 1000
-- A refusal speaks of a second's calls: quotas are given in calls a second.
local SAMPLE_MS = 1000
-- Of fewer calls a second, half a one more or less is worth a try.
local FEW = 5
-- One refusal in so long, with the rate at the limit, is no more than a call that came early.
local STRAY_MS = 60000
-- Seconds in which the rate doubles up to the plateau, and in which it comes from there to the limit
-- at most, slowly at first (the convex half of CUBIC).
local DOUBLING_S, PROBE_S = 2, 30
-- Seconds that the plateau is kept in between: each probe of a quota that has not come back costs a
-- refusal, so that after every cut that found no other quota the next one waits twice as long.
local LEAST_HOLD_S, MOST_HOLD_S = 20, 60

local time = redis.call('TIME')
local now = time[1] * 1000 + time[2] / 1000
local limit, aim = tonumber(ARGV[2]), tonumber(ARGV[3])
local state = redis.call('HMGET', KEYS[1], 'tat', 'at', 'since', 'sent', 'refused', 'rate',
  'plateau', 'cut', 'stray', 'hold', 'slot', 'looked', 'later', 'void')
-- When the clock was set back, what lies ahead goes back with it.
local back = math.max(0, tonumber(state[2] or now) - now)
local tat = tonumber(state[1] or 0) - back
local since = tonumber(state[3] or now) - back
local sent, refused = tonumber(state[4] or 0), tonumber(state[5] or 0)
local base = tonumber(state[6] or limit)
local plateau = math.min(limit, tonumber(state[7] or limit))
local cut = state[8] and tonumber(state[8]) - back
local stray = tonumber(state[9] or 0) - back
local hold = tonumber(state[10] or LEAST_HOLD_S)
local slot = tonumber(state[11] or 0)
local void = tonumber(state[14] or 0)
local looked, later = tonumber(state[12] or 0), tonumber(state[13] or MOST_LATER_MS)

local rate, is_probe = limit, false
if cut then
  local seconds = math.max(0, now - cut) / 1000
  rate = base * 2 ^ (seconds / DOUBLING_S)
  if rate >= plateau then
    seconds = seconds - DOUBLING_S * math.log(plateau / base) / math.log(2) - hold
    is_probe = seconds > 0
    rate = math.min(limit, plateau + limit * (math.max(0, seconds) / PROBE_S) ^ 3)
  end
end
if rate >= limit then cut = nil end

local function start_anew(at)
  since, sent, refused = at, 0, 0
end

local interval = 1000 / rate
-- So many calls later a second has passed; where they are no whole number, what makes them whole.
local second = math.max(1, math.floor(rate / aim + 0.001))
if ARGV[1] == 'late' then
  for i = 5, #ARGV - 2, 3 do
    local earliest = ARGV[i + 1] + ARGV[i + 2] + aim * second * interval + MARGIN_MS
    -- If that one is given away by now, whoever has it for long looks here again before it is used.
    local is_open = ARGV[i] + second >= slot or ARGV[i + 1] + second * interval > now + ARGV[4]
    -- What lies far ahead is of a clock that was set back since.
    if is_open and earliest > now and earliest < now + 2 * second * interval + SAMPLE_MS then
      redis.call('HSET', KEYS[2], ARGV[i], string.format('%.3f', earliest))
    end
    -- Told once more after it was looked for, it would stay.
    redis.call('HDEL', KEYS[2], string.format('%.0f', ARGV[i] - second))
  end
  redis.call('PEXPIRE', KEYS[2], math.ceil(2 * second * interval))
  return {}
elseif ARGV[1] == 'check' then
  local found = {}
  for i = 4, #ARGV do
    local before = string.format('%.0f', ARGV[i] - second)
    found[i - 3] = tonumber(ARGV[i]) < void and 'inf' or redis.call('HGET', KEYS[2], before) or ''
    redis.call('HDEL', KEYS[2], before)
  end
  return found
end

-- An idle time earns at most a burst of slots that have passed already.
local earned = 0
local answer
if ARGV[1] == 'throttle' then
  local pause, sent_at = tonumber(ARGV[4]), now - ARGV[5]
  local resumed = now
  if pause > 0 then
    -- What other workers have reserved for now is still used: a second later none of it counts.
    local last = math.min(tat - interval, now + ARGV[6])
    resumed = math.max(now + pause, last + SAMPLE_MS)
    void = slot
  end
  -- What was sent before the last cut says nothing of the rate after it.
  if sent_at >= since - interval / 2 then
    refused = refused + 1
    local seconds = (sent_at - since) / SAMPLE_MS
    -- Slots that were reserved but come after it say nothing.
    local asked = sent - math.max(0, math.floor((tat - sent_at) / interval + 0.5) - 1)
    local closed = refused >= asked
    if pause > 0 or (seconds >= 1 and (closed or refused > 1)) then
      -- What was borne: the share that was not refused, but for one that may be a stray; or as many
      -- calls as a second's quota had room for, when it ran out sooner.
      local borne = closed and 0 or 1 - (refused - 1) / asked
      if not closed and seconds < 1 then
        local passed = asked - refused
        if passed < FEW and passed + 0.5 < NEWS * rate / aim then passed = passed + 0.5 end
        borne = math.min(borne, passed / rate)
      end
      if not cut and now - stray > STRAY_MS and (borne == 1 or (pause > 0 and not closed)) then
        stray = now
      else
        if closed then
          base = rate * CUT
        else
          base = rate * (borne < 1 and math.max(LEAST, borne * aim) or EASE)
          hold = math.min(MOST_HOLD_S, 2 * hold)
          if is_probe then
            -- Between what was borne all the while and what was refused just now.
            base = math.max(plateau, math.min(base, (plateau + rate) / 2))
          elseif borne < NEWS then
            hold = LEAST_HOLD_S
          end
          plateau = base
        end
        base = math.max(limit * FLOOR, base)
        plateau = math.max(base, plateau)
        cut = resumed
        interval = 1000 / base
        redis.call('DEL', KEYS[2])
      end
      -- Until a second is over, calls are refused for what went before; and slots that others have
      -- reserved by now are not counted any more, nor what becomes of them.
      start_anew((closed or pause > 0) and resumed or math.max(tat, now + SAMPLE_MS))
    end
  end
  if pause > 0 and resumed > since then start_anew(resumed) end
  tat = math.max(tat, resumed)
  answer = { string.format('%.3f', tat - now), string.format('%.6f', interval) }
else
  earned = (ARGV[4] - 1) * interval
  if tat < now - earned - SAMPLE_MS then start_anew(now) end
  tat = math.max(tat, now - earned)
  local permits, put_off = 0, 0
  if ARGV[1] == 'reserve' then
    if tat - now <= tonumber(ARGV[7]) then
      permits = math.max(1, math.min(tonumber(ARGV[5]), math.floor(ARGV[6] / interval), MOST_PERMITS))
    end
    answer = {
      string.format('%.3f', now), string.format('%.3f', tat), string.format('%.6f', interval),
      string.format('%.0f', slot),
    }
    local before = {}
    for i = 1, permits do before[i] = string.format('%.0f', slot + i - 1 - second) end
    for i, earliest in ipairs(permits > 0 and redis.call('HMGET', KEYS[2], unpack(before)) or {}) do
      local late = (tonumber(earliest) or 0) - tat - (i - 1) * interval
      if earliest then redis.call('HDEL', KEYS[2], before[i]) end
      table.insert(answer, earliest or '')
      looked, later = looked + 1, math.min(later, math.max(0, late))
    end
    -- What is later in all of a second's slots is no single call's lateness.
    if looked >= second then
      put_off, looked, later = later, 0, MOST_LATER_MS
    end
  elseif tat <= now then
    permits = 1
    answer = { '0' }
  else
    -- Never rounded to 0, which would be a permit.
    answer = { string.format('%.3f', math.max(0.001, tat - now)) }
  end
  if tat >= since then sent = sent + permits end
  slot = slot + permits
  tat = tat + permits * interval + put_off
end

redis.call('HSET', KEYS[1], 'tat', string.format('%.3f', tat), 'at', string.format('%.3f', now),
  'since', string.format('%.3f', since), 'sent', sent, 'refused', refused,
  'stray', string.format('%.3f', stray), 'hold', hold, 'slot', string.format('%.0f', slot),
  'void', string.format('%.0f', void),
  'looked', looked, 'later', string.format('%.3f', later))
if cut then
  redis.call('HSET', KEYS[1], 'rate', string.format('%.6f', base),
    'plateau', string.format('%.6f', plateau), 'cut', string.format('%.3f', cut))
elseif state[8] then
  redis.call('HDEL', KEYS[1], 'rate', 'plateau', 'cut')
end
-- Forgotten when idle: by then it would be back at the limit, unless paused for longer, and would
-- have earned its burst.
redis.call('PEXPIRE', KEYS[1], math.ceil(math.max(0, tat - now) + earned + 3600000))
return answer
