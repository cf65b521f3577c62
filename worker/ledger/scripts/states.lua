-- The life of a job: what every script that moves jobs shares. It is put before each of them, and
-- with the answer of each goes which jobs' records were found to be damaged.
-- KEYS are those of one run, in the order of keys.py, so that they lie in one cluster slot.
-- SCHEMA, the newest that this version knows, is put before this: of a newer one's run nothing is
-- read and nothing is changed.

local RUN, JOBS, WAITING, SENT, LEASED, ACCEPTED = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local OUTCOME = {
  accepted = KEYS[7], deleted = KEYS[8], already_deleted = KEYS[9],
  skipped = KEYS[10], failed = KEYS[11], cancelled = KEYS[12],
}
local KEPT = KEYS[13]
-- What a worker may record; into `leased` leads only the claim.
local MOVES = {
  leased = {
    leased = true, pending = true, accepted = true, deleted = true, already_deleted = true,
    skipped = true, failed = true, cancelled = true,
  },
  accepted = { deleted = true, failed = true },
}

-- One clock for all: the server's.
local function now_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

local NOW = now_ms()
local run = {}
do
  local names = {
    'state', 'total', 'verify', 'cancelled_ms', 'braked_ms', 'note', 'retention_s',
    'max_failures', 'max_failure_percent', 'maker', 'created_ms', 'planned_ms',
    'started_ms', 'schema',
  }
  local values = redis.call('HMGET', RUN, unpack(names))
  for i, name in ipairs(names) do run[name] = values[i] end
end
if run.schema and (tonumber(run.schema) or math.huge) > SCHEMA then
  return redis.error_reply('SCHEMA ' .. run.schema)
end

local counts = {}
local function count(state, by) counts[state] = (counts[state] or 0) + by end

-- Why a job of a cancelled run is not executed, or not again: a call without an answer, or with a
-- server's fault, may have been obeyed all the same.
local function why_cancelled(job)
  local why = run.braked_ms and run.note or 'the run was cancelled'
  local last = job.attempts and job.attempts[#job.attempts]
  if last and (last[3] == 0 or last[3] >= 500) then
    why = why .. '; it was called before, and what came of it is not known'
  end
  return why
end

-- Ends a job whose record is missing or is none, where the indexes say that it has not ended: what
-- was done about its pool is not known, and nothing is deleted on doubt.
local damaged = {}
local function write_off(n, text)
  if run.state ~= 'running' then return end
  local from
  if redis.call('ZREM', WAITING, n) + redis.call('ZREM', SENT, n) > 0 then
    from = 'pending'
  elseif redis.call('ZREM', LEASED, n) > 0 then
    from = 'leased'
  elseif redis.call('ZREM', ACCEPTED, n) > 0 then
    from = 'accepted'
  else
    return
  end
  local reason = 'its record in the ledger is missing'
  if text then
    reason = 'its record in the ledger is damaged: ' .. text:sub(1, 300):gsub('[^\32-\126]', '?')
  end
  count(from, -1)
  count('failed', 1)
  redis.call('RPUSH', OUTCOME.failed, n)
  redis.call('HSET', JOBS, n, cjson.encode({
    pool = '', name = '', project = '', created = '', fingerprint = '', chosen = '',
    state = 'failed', reason = reason, done = NOW,
  }))
  damaged[#damaged + 1] = n
  damaged[#damaged + 1] = reason
end

-- Whether a record is what the scripts rely on; whoever carries out the job checks the rest.
local function is_sound(job)
  if type(job) ~= 'table' then return false end
  if job.state ~= 'pending' and job.state ~= 'leased' and not OUTCOME[job.state] then return false end
  if job.state == 'leased' and type(job.owner) ~= 'string' then return false end
  if job.due and not (type(job.due) == 'number' and job.due < math.huge) then return false end
  if not job.attempts then return true end
  if type(job.attempts) ~= 'table' then return false end
  for _, attempt in pairs(job.attempts) do
    if type(attempt) ~= 'table' or type(attempt[3]) ~= 'number' then return false end
  end
  return true
end

-- A job, and its record; nil if that is missing or damaged: such a job ends here, and harms no other.
-- `state` is the one that an index says the job is in, if the caller has its number from there.
local function read(n, state)
  local text = redis.call('HGET', JOBS, n)
  local is_json, job = pcall(cjson.decode, text)
  if is_json and is_sound(job) and (not state or job.state == state) then return job, text end
  write_off(n, text)
end

local function is_final(state)
  return OUTCOME[state] ~= nil and (state ~= 'accepted' or run.verify == '0')
end

-- Moves a job, which the caller has checked, and keeps every index in step.
-- `at` is the time in ms that the new state's index is ordered by. Returns the job's record then;
-- nil if its record was damaged after all: one that holds 1e999 can be read, and not written.
local function move(n, job, to, at)
  local from = job.state
  if to == 'pending' and run.cancelled_ms then
    to = 'cancelled'
    job.reason = why_cancelled(job)
  end
  job.state = to
  if to ~= 'leased' then job.owner = nil end
  job.due = to == 'pending' and at > NOW and at or nil
  if is_final(to) then
    job.done = NOW
    job.blocked = nil
  end
  local is_json, record = pcall(cjson.encode, job)
  if not is_json then return write_off(n, redis.call('HGET', JOBS, n)) end
  if from == 'pending' then
    redis.call('ZREM', WAITING, n)
    redis.call('ZREM', SENT, n)
  elseif from == 'leased' and to ~= 'leased' then
    redis.call('ZREM', LEASED, n)
  elseif from == 'accepted' then
    redis.call('ZREM', ACCEPTED, n)
  end
  if is_final(to) then
    redis.call('RPUSH', OUTCOME[to], n)
  elseif to == 'pending' then
    redis.call('ZADD', WAITING, at, n)
  elseif to == 'leased' and from ~= 'leased' then
    redis.call('ZADD', LEASED, at, n)
  elseif to == 'accepted' then
    redis.call('ZADD', ACCEPTED, NOW, n)
  end
  if from ~= to then
    count(from, -1)
    count(to, 1)
  end
  redis.call('HSET', JOBS, n, record)
  return record
end

-- Too many failures stop the rest of a run: no job is claimed any more, and what waits is
-- cancelled by whoever comes next. Accepted jobs count as tried, since their end takes long.
local FEWEST_FOR_PERCENT = 10
local function brake(final)
  if run.cancelled_ms or not (run.max_failures or run.max_failure_percent) then return end
  local failed = redis.call('LLEN', OUTCOME.failed)
  local tried = final + (run.verify == '0' and 0 or redis.call('ZCARD', ACCEPTED))
  local why
  if run.max_failures and failed > tonumber(run.max_failures) then
    why = 'more than max_failures=' .. run.max_failures
  elseif tried >= FEWEST_FOR_PERCENT
      and failed * 100 > tonumber(run.max_failure_percent or 100) * tried then
    why = 'more than max_failure_percent=' .. run.max_failure_percent
  else
    return
  end
  local note = 'braked: ' .. failed .. ' of ' .. tried .. ' jobs tried failed, ' .. why
  redis.call('HSET', RUN, 'cancelled_ms', NOW, 'braked_ms', NOW, 'note', note)
end

-- From when a run has ended, its records age.
local function age()
  for _, key in ipairs(KEYS) do redis.call('EXPIRE', key, run.retention_s) end
end

-- Writes the counts; ends the run when its last job is final.
local function settle_counts()
  for state, by in pairs(counts) do
    if by ~= 0 then redis.call('HINCRBY', RUN, 'jobs:' .. state, by) end
  end
  if run.state ~= 'running' then return end
  local final = 0
  for state, key in pairs(OUTCOME) do
    if is_final(state) then final = final + redis.call('LLEN', key) end
  end
  brake(final)
  if final == tonumber(run.total) then
    redis.call('HSET', RUN, 'state', 'finished', 'finished_ms', NOW)
    age()
  end
end

-- Ends a run that was never started; its jobs stay only as what a dry run would have deleted.
local function give_up(state, note)
  redis.call('HSET', RUN, 'state', state, 'finished_ms', NOW, 'note', note)
  if state == 'braked' then redis.call('HSET', RUN, 'braked_ms', NOW) end
  if state == 'planned' then
    local total = redis.call('HLEN', JOBS)
    redis.call('HSET', RUN, 'total', total, 'jobs:pending', total)
  else
    redis.call('UNLINK', JOBS, WAITING)
  end
  age()
end
