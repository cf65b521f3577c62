-- Ends a run that was never started. ARGV: age in ms that it must have, state, reason.
-- Returns 1, or 0 if the run is not being created or too young.
if run.state ~= 'creating' then return 0 end
if NOW - tonumber(redis.call('HGET', RUN, 'created_ms')) < tonumber(ARGV[1]) then return 0 end
redis.call('HSET', RUN, 'state', ARGV[2], 'finished_ms', NOW, 'note', ARGV[3])
if ARGV[2] == 'braked' then redis.call('HSET', RUN, 'braked_ms', NOW) end
for _, key in ipairs(KEYS) do redis.call('EXPIRE', key, run.retention_s) end
return 1
