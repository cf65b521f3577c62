-- Opens a run that takes jobs but executes none yet.
-- ARGV: field, value, ... of the run. Returns 1, or 0 if there is such a run already.
if run.state then return 0 end
redis.call('HSET', RUN, 'state', 'creating', 'created_ms', NOW, 'total', 0, unpack(ARGV))
return 1
