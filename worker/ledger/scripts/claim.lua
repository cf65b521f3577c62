-- Leases pending jobs that are due to an owner. Asking twice as the same owner gives the same.
-- ARGV: owner, lease in ms, number, ... Returns number, record, ... of what was leased.
if run.state ~= 'running' or run.cancelled_ms then return {} end
local owner, expiry, leased = ARGV[1], NOW + ARGV[2], {}
for i = 3, #ARGV do
  local n = ARGV[i]
  local job, record = read(n, redis.call('ZSCORE', SENT, n) and 'pending')
  if job and job.state == 'pending' and (job.due or 0) <= NOW then
    job.owner = owner
    record = move(n, job, 'leased', expiry)
  end
  if record and job.state == 'leased' and job.owner == owner then
    leased[#leased + 1] = n
    leased[#leased + 1] = record
  end
end
settle_counts()
return leased
