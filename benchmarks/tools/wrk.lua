-- What wrk sends: one body again and again, with a new number each time where it says {seed}.
--   wrk -s wrk.lua … URL -- FILE_WITH_THE_BODY FIRST_SEED METHOD
-- At the end it prints what it saw as one line of JSON.

local before, behind, whole
local seed = 0

function init(arguments)
  local file = assert(io.open(arguments[1], "rb"))
  local body = file:read("*a")
  file:close()
  seed = tonumber(arguments[2])
  wrk.method = arguments[3]
  local start, stop = string.find(body, "{seed}", 1, true)
  if start then
    before, behind = string.sub(body, 1, start - 1), string.sub(body, stop + 1)
  else
    whole = wrk.format(nil, nil, nil, body)
  end
end

function request()
  if whole then
    return whole
  end
  seed = seed + 1
  return wrk.format(nil, nil, nil, before .. string.format("%d", seed) .. behind)
end

function done(summary, latency)
  local errors = summary.errors
  local line = '{"replies": %d, "microseconds": %d, "bytes": %d, "refused": %d, "lost": %d, "late": %d, '
    .. '"p50_us": %d, "p90_us": %d, "p99_us": %d, "max_us": %d}'
  print(string.format(line, summary.requests, summary.duration, summary.bytes, errors.status,
    errors.connect + errors.read + errors.write, errors.timeout,
    latency:percentile(50), latency:percentile(90), latency:percentile(99), latency.max))
end
