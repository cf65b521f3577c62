-- Cancels a run: jobs not yet claimed end here, those under way end as they end.
-- ARGV: how many jobs at most in this call. Returns how many are left to cancel,
-- or -1 if the run has ended.
if run.state == 'queued' or run.state == 'creating' then
  redis.call('HSET', RUN, 'cancelled_ms', NOW)
  give_up('aborted', 'the run was cancelled before it started')
  return 0
end
if run.state ~= 'running' then return -1 end
if not run.cancelled_ms then
  redis.call('HSET', RUN, 'cancelled_ms', NOW)
  run.cancelled_ms = NOW
end
for _, index in ipairs({ WAITING, SENT }) do
  for _, n in ipairs(redis.call('ZRANGE', index, 0, ARGV[1] - 1)) do
    local job = read(n, 'pending')
    if job then
      job.reason = why_cancelled(job)
      move(n, job, 'cancelled', NOW)
    end
  end
end
settle_counts()
return redis.call('ZCARD', WAITING) + redis.call('ZCARD', SENT)
