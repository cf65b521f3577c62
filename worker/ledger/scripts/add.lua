-- Adds jobs to a run that is being created; one that is there already stays as it is.
-- ARGV: maker, number, record, ... Returns the number of jobs then, or -1 if the run takes no more
-- from this maker.
if run.state ~= 'creating' or run.maker ~= ARGV[1] then return -1 end
for i = 2, #ARGV, 2 do
  if redis.call('HSETNX', JOBS, ARGV[i], ARGV[i + 1]) == 1 then
    -- By number: the run's order, and due since long ago.
    redis.call('ZADD', WAITING, ARGV[i], ARGV[i])
  end
end
return redis.call('HLEN', JOBS)
