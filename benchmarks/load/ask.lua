-- Asks for the lines of a file, one after another: method, path, token and body, separated by tabs.
-- "{n}" in a body becomes a number that no other request of the run has.
local asks, place, number, seed = {}, 0, 0, 0

local threads = 0
function setup(thread)
  thread:set("seed", threads)
  threads = threads + 1
end

function init(arguments)
  for line in io.lines(arguments[1]) do
    local method, path, token, body = line:match("^([^\t]*)\t([^\t]*)\t([^\t]*)\t(.*)$")
    local headers = {["Authorization"] = "Bearer " .. token}
    if body ~= "" then headers["Content-Type"] = "application/json" end
    asks[#asks + 1] = {method, path, headers, body}
  end
  place = math.floor(#asks * seed / 4)
  number = seed * 100000000
end

function request()
  place = place % #asks + 1
  number = number + 1
  local ask = asks[place]
  local body = ask[4]
  if body == "" then return wrk.format(ask[1], ask[2], ask[3]) end
  return wrk.format(ask[1], ask[2], ask[3], (body:gsub("{n}", tostring(number))))
end

function done(summary, latency, requests)
  local failed = summary.errors.connect + summary.errors.read + summary.errors.write
  io.write(string.format(
    '{"requests": %d, "seconds": %.6f, "bytes": %d, "refused": %d, "failed": %d, "timeouts": %d,'
      .. ' "p50_seconds": %.6f, "p99_seconds": %.6f, "mean_seconds": %.6f, "max_seconds": %.6f}\n',
    summary.requests, summary.duration / 1e6, summary.bytes, summary.errors.status, failed,
    summary.errors.timeout, latency:percentile(50) / 1e6, latency:percentile(99) / 1e6,
    latency.mean / 1e6, latency.max / 1e6))
end
