"""Who is answered next: requests wait in a list for each team, and the teams take turns.

Every step is one Lua script, so that it happens whole or not at all. What the scripts keep, below
a common prefix:

- `request:<id>` the request itself, which expires or is deleted when nobody waits for it any more;
- `waiting:<device>:<team>` the team's ids, the oldest first;
- `teams:<device>` the teams that have a list, the next one first, each once;
- `running:<id>` says that a worker answers the request; expires unless the worker renews it.

An id whose request is gone counts for nothing: it is skipped when its turn comes, and dropped
before anybody is refused for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast

from store.errors import QueueFull

if TYPE_CHECKING:
    import redis

_MOST_RETRY_SECONDS: Final = 30
_REQUESTS_A_SECOND: Final = 10
"""A guess, only used to say when to come again."""

_LIVE: Final = """
local prefix, device = KEYS[1], ARGV[1]
local teams = prefix .. 'teams:' .. device

local function list_of(team) return prefix .. 'waiting:' .. device .. ':' .. team end

-- Drops the ids whose request is gone, and returns how many are left.
local function count_live(team)
  local list, count = list_of(team), 0
  for _, id in ipairs(redis.call('LRANGE', list, 0, -1)) do
    if redis.call('EXISTS', prefix .. 'request:' .. id) == 1 then
      count = count + 1
    else
      redis.call('LREM', list, 1, id)
    end
  end
  if count == 0 then redis.call('LREM', teams, 0, team) end
  return count
end

local function count_all(count)
  local all = 0
  for _, team in ipairs(redis.call('LRANGE', teams, 0, -1)) do all = all + count(team) end
  return all
end
"""

_PUT: Final = f"""{_LIVE}
local team, id, payload = ARGV[2], ARGV[3], ARGV[4]
local keep, most, most_of_team = tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7])
local list = list_of(team)
local mine = redis.call('LLEN', list)
if mine >= most_of_team then mine = count_live(team) end
if mine >= most_of_team then return {{'team', mine}} end
local all = count_all(function(one) return redis.call('LLEN', list_of(one)) end)
if all >= most then all = count_all(count_live) end
if all >= most then return {{'all', all}} end
if redis.call('LLEN', list) == 0 then
  redis.call('LREM', teams, 0, team)
  redis.call('RPUSH', teams, team)
end
redis.call('SET', prefix .. 'request:' .. id, payload, 'EX', keep)
redis.call('RPUSH', list, id)
redis.call('EXPIRE', list, keep)
redis.call('EXPIRE', teams, keep)
return {{'ok', all + 1}}
"""

_TAKE: Final = f"""{_LIVE}
local lost = tonumber(ARGV[2])
while true do
  local team = redis.call('LPOP', teams)
  if not team then return false end
  local list = list_of(team)
  local id = redis.call('LPOP', list)
  while id do
    local request = prefix .. 'request:' .. id
    local payload = redis.call('GET', request)
    if payload then
      redis.call('DEL', request)
      redis.call('SET', prefix .. 'running:' .. id, '1', 'EX', lost)
      if redis.call('LLEN', list) > 0 then
        local left = redis.call('TTL', list)
        redis.call('RPUSH', teams, team)
        -- The last team of the rotation may just have been taken out of it, and its time with it.
        if redis.call('TTL', teams) < left then redis.call('EXPIRE', teams, left + 1) end
      end
      return {{id, payload}}
    end
    id = redis.call('LPOP', list)
  end
end
"""

_COUNT: Final = f"""{_LIVE}
return count_all(count_live)
"""


class Taken(NamedTuple):
    """A request whose turn it is."""

    id: str
    payload: bytes


class FairQueue:
    """The waiting requests of all devices. Safe to share between threads."""

    def __init__(self, client: redis.Redis, *, prefix: str) -> None:
        self._prefix = prefix
        self._put = client.register_script(_PUT)
        self._take = client.register_script(_TAKE)
        self._count = client.register_script(_COUNT)

    def put(
        self,
        request_id: str,
        payload: bytes,
        *,
        device: str,
        team: str,
        keep_seconds: int,
        max_waiting: int,
        max_waiting_per_team: int,
    ) -> None:
        """Let a request wait for its team's turn.

        Raises:
            QueueFull: So many requests wait already, in all or of this team.
        """
        arguments = [
            device, team, request_id, payload, keep_seconds, max_waiting, max_waiting_per_team,
        ]  # fmt: skip
        which, count = cast("tuple[bytes, int]", self._run(self._put, arguments))
        if which != b"ok":
            bound = max_waiting_per_team if which == b"team" else max_waiting
            whose = f"of team {team!r}" if which == b"team" else "of all teams"
            seconds = min(_MOST_RETRY_SECONDS, 1 + count // _REQUESTS_A_SECOND)
            raise QueueFull(
                f"{count} requests {whose} wait for the inference workers of device {device!r}; at"
                f" most {bound} may. Try again in {seconds} seconds.",
                retry_after_seconds=seconds,
            )

    def take(self, *, device: str, lost_seconds: int) -> Taken | None:
        """Take the oldest request of the team whose turn it is, and mark it as running."""
        found = cast("tuple[bytes, bytes] | None", self._run(self._take, [device, lost_seconds]))
        return None if found is None else Taken(found[0].decode(), found[1])

    def num_waiting(self, device: str) -> int:
        """Count the requests that wait for a device."""
        return cast("int", self._run(self._count, [device]))

    def _run(self, script: Any, arguments: list[Any]) -> object:
        return script(keys=[self._prefix], args=arguments)
