-- Takes back jobs whose lease ran out: their worker died or lost Redis. The lost lease counts
-- as an attempt, so that a job which kills its workers is given up.
-- ARGV: how many at most, attempts allowed. Returns how many were taken back.
local lost = redis.call('ZRANGEBYSCORE', LEASED, '-inf', NOW, 'LIMIT', 0, ARGV[1])
local suspects = 0
for _, n in ipairs(lost) do
  local job = read(n, 'leased')
  if job then
    job.attempts = job.attempts or {}
    job.attempts[#job.attempts + 1] = { NOW, 0, 0, 'lease_expired', '' }
    if #job.attempts >= tonumber(ARGV[2]) then
      job.reason = 'given up after ' .. #job.attempts .. ' attempts: the worker was lost during the last'
      move(n, job, 'failed', NOW)
    else
      job.reason = 'the lease of worker ' .. job.owner .. ' ran out'
      -- One of them may be what kills the workers: from the second time on they come back one by
      -- one, so that it strikes none but itself.
      local before = job.attempts[#job.attempts - 1]
      if before and before[4] == 'lease_expired' then suspects = suspects + 1 end
      move(n, job, 'pending', NOW + 2000 * math.max(0, suspects - 1))
    end
  end
end
settle_counts()
return #lost
