-- Notes pools that the plan of a run keeps, while the run is being created.
-- ARGV: maker, how many are noted already, record, ... Noting the same again changes nothing.
-- Returns the number noted then, or -1 if the run takes no more from this maker.
if run.state ~= 'creating' or run.maker ~= ARGV[1] then return -1 end
if redis.call('LLEN', KEPT) == tonumber(ARGV[2]) then
  for i = 3, #ARGV do redis.call('RPUSH', KEPT, ARGV[i]) end
end
return redis.call('LLEN', KEPT)
