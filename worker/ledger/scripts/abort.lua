-- Ends a run that was never started.
-- ARGV: maker ('': whoever it is), age in ms that it must have, state, reason.
-- Returns 1, or 0 if the run has started or ended, is another maker's, or too young.
if run.state ~= 'creating' and run.state ~= 'queued' then return 0 end
if ARGV[1] ~= '' and run.maker ~= ARGV[1] then return 0 end
if NOW - tonumber(run.planned_ms or run.created_ms) < tonumber(ARGV[2]) then return 0 end
give_up(ARGV[3], ARGV[4])
return 1
