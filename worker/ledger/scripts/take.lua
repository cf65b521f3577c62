-- Takes due jobs to be sent to the workers, no more than the window has room for.
-- A job that was sent and not claimed in time has lost its message: it is sent again.
-- ARGV: window, batch size, ms until a sent job counts as lost. Returns job numbers.
if run.state ~= 'running' then return {} end
for _, n in ipairs(redis.call('ZRANGEBYSCORE', SENT, '-inf', NOW, 'LIMIT', 0, 1000)) do
  redis.call('ZREM', SENT, n)
  redis.call('ZADD', WAITING, NOW, n)
end
local room = ARGV[1] - redis.call('ZCARD', SENT) - redis.call('ZCARD', LEASED)
if room <= 0 then return {} end
local due = redis.call('ZCOUNT', WAITING, '-inf', NOW)
-- While there is more to come, whole batches only: a message for each job would cost more.
if due > room then room = room - room % ARGV[2] end
if room <= 0 then return {} end
local taken = redis.call('ZRANGEBYSCORE', WAITING, '-inf', NOW, 'LIMIT', 0, room)
for _, n in ipairs(taken) do
  redis.call('ZREM', WAITING, n)
  redis.call('ZADD', SENT, NOW + ARGV[3], n)
end
return taken
