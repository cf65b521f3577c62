-- Gives a project to another run, unless somebody else did. ARGV: the run that had it, the new one.
-- Returns 1, or 0 if another run has it by now. KEYS[1] is not of a run, so it stands alone.
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2])
return 1
