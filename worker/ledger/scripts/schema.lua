-- Notes that this Redis is used with a schema; the note only ever grows. ARGV: the caller's.
-- Returns what was noted before: a caller with an older one must not go on.
-- KEYS[1] is not of a run, so it stands alone.
local noted = redis.call('GET', KEYS[1])
if not noted or (tonumber(noted) or math.huge) < tonumber(ARGV[1]) then
  redis.call('SET', KEYS[1], ARGV[1])
end
return noted
