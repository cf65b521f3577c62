-- Records what happened to jobs. ARGV[1]: JSON list of moves
--   {n, from, to, owner (of a lease), attempt, reason, wait_ms (until a pending job is due),
--    blocked (it waits for other pools)}.
-- A move from another state than the job is in, or of a lease that is another's, is refused.
-- Returns 1 (done) or 0 (refused) for each.
local function is_same(one, other)
  for i = 1, 5 do
    if one[i] ~= other[i] then return false end
  end
  return true
end

local answers = {}
for i, wish in ipairs(cjson.decode(ARGV[1])) do
  local job = read(wish.n)
  local holds = job and job.state == wish.from and MOVES[wish.from] and MOVES[wish.from][wish.to]
  if holds and wish.from == 'leased' then holds = job.owner == wish.owner end
  if holds then
    if wish.attempt then
      job.attempts = job.attempts or {}
      local last = job.attempts[#job.attempts]
      -- The same attempt twice is this script sent again because its answer was lost.
      if not last or not is_same(last, wish.attempt) then
        job.attempts[#job.attempts + 1] = wish.attempt
      end
    end
    job.reason = wish.reason
    -- Any other wait in between starts the count anew: during a pause nothing can end it.
    if wish.blocked then
      job.blocked = job.blocked or NOW
    elseif wish.to == 'pending' then
      job.blocked = nil
    end
    holds = move(wish.n, job, wish.to, NOW + (wish.wait_ms or 0))
  end
  answers[i] = holds and 1 or 0
end
settle_counts()
return answers
