-- Gives up a run that was never started. ARGV: age in ms that it must have, reason.
-- Returns 1, or 0 if the run is not being created or too young.
if run.state ~= 'creating' then return 0 end
if NOW - tonumber(redis.call('HGET', RUN, 'created_ms')) < tonumber(ARGV[1]) then return 0 end
redis.call('HSET', RUN, 'state', 'aborted', 'finished_ms', NOW, 'note', ARGV[2])
for _, key in ipairs(KEYS) do redis.call('EXPIRE', key, run.retention_s) end
return 1
