-- Lets the workers at a run whose jobs are all there.
-- ARGV: maker, total. Returns 1, or 0 if the run is not being created by this maker or jobs are
-- missing. Asking again changes nothing.
if run.maker ~= ARGV[1] or redis.call('HLEN', JOBS) ~= tonumber(ARGV[2]) then return 0 end
if run.state ~= 'creating' then return run.started_ms and 1 or 0 end
redis.call('HSET', RUN, 'state', 'running', 'started_ms', NOW, 'total', ARGV[2],
  'jobs:pending', ARGV[2])
run.state, run.total = 'running', ARGV[2]
settle_counts()
return 1
