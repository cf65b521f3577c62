-- Lets the workers at a run whose jobs are all there.
-- ARGV: total. Returns 1, or 0 if the run is not being created or jobs are missing.
if run.state ~= 'creating' or redis.call('HLEN', JOBS) ~= tonumber(ARGV[1]) then return 0 end
redis.call('HSET', RUN, 'state', 'running', 'started_ms', NOW, 'total', ARGV[1],
  'jobs:pending', ARGV[1])
run.state, run.total = 'running', ARGV[1]
settle_counts()
return 1
