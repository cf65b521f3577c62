-- Adds jobs to a run that is being created; one that is there already stays as it is.
-- ARGV: number, record, ... Returns the number of jobs then, or -1 if the run takes no more.
if run.state ~= 'creating' then return -1 end
for i = 1, #ARGV, 2 do
  if redis.call('HSETNX', JOBS, ARGV[i], ARGV[i + 1]) == 1 then
    -- By number: the run's order, and due since long ago.
    redis.call('ZADD', WAITING, ARGV[i], ARGV[i])
  end
end
return redis.call('HLEN', JOBS)
