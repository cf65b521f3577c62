-- Opens a run that takes jobs but executes none yet, or has it wait to be planned.
-- ARGV: state ('creating' or 'queued'), maker, field, value, ... of the run.
-- A run that waits, or that another maker was cut off at, is begun anew by this one: what the
-- other had added is dropped, and what it still adds is refused.
-- Returns 1, or 0 if there is such a run already and it is past this, or was cancelled.
local to, maker = ARGV[1], ARGV[2]
local CUT_OFF = { queued = true, creating = true, aborted = not run.cancelled_ms }
if run.state and (to == 'queued' or not CUT_OFF[run.state]) then return 0 end
if run.state == 'creating' and run.maker == maker then return 1 end
if run.state == 'aborted' then
  redis.call('PERSIST', RUN)
  redis.call('HDEL', RUN, 'finished_ms', 'note')
end
redis.call('UNLINK', JOBS, WAITING, KEPT)
redis.call('HSETNX', RUN, 'created_ms', NOW)
redis.call('HSET', RUN, 'state', to, 'maker', maker, 'planned_ms', NOW, 'total', 0,
  'schema', SCHEMA, unpack(ARGV, 3))
return 1
