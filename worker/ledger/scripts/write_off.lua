-- Ends jobs whose records only the caller could tell to be damaged. ARGV: number, ...
-- Returns how many numbers were given.
for _, n in ipairs(ARGV) do write_off(n, redis.call('HGET', JOBS, n)) end
settle_counts()
return #ARGV
