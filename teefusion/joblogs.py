"""A pod's log in ours, line by line, over connections that break.

The API cannot say "from this line on", only "from so many seconds ago". So a broken stream is taken up a little before
its last line, and what was shown is known by its time stamp.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING

from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError

if TYPE_CHECKING:
    from teefusion.cluster import Cluster

log = logging.getLogger("teefusion.jobs")
_OVERLAP_S = 5  # repeated when a stream is taken up again, for clocks that differ
_RETRY_S = 2.0
_LAST_TRIES = 5  # of an ended pod's log


class LogFollower(threading.Thread):
    """Shows the lines of one pod's training container until the pod's log ends or ``finish`` is called."""

    def __init__(self, cluster: Cluster, pod: str) -> None:
        super().__init__(name=f"log of {pod}", daemon=True)
        self.pod = pod
        self._cluster = cluster
        self._ended = threading.Event()
        self._lost = False  # gone, or forbidden
        self._last_stamp, self._last_at = "", 0.0

    def run(self) -> None:
        """Follow, and take up again what breaks off, until there is nothing more to come."""
        tries_left = _LAST_TRIES
        while tries_left:
            ending = self._ended.is_set()
            came_to_its_end = self._try_to_follow()
            if self._lost or (ending and came_to_its_end):
                return  # followed once more after the pod's end, so all has been shown
            if ending:
                tries_left -= 1
                time.sleep(_RETRY_S / _LAST_TRIES)
            else:
                self._ended.wait(_RETRY_S)

    def finish(self, patience_s: float) -> None:
        """The pod has ended: wait for its last lines, at most so long."""
        self._ended.set()
        self.join(patience_s)

    def _try_to_follow(self) -> bool:
        """Whether the stream came to its end, rather than broke off."""
        try:
            self._follow()
        except ApiException as error:
            if error.status == 403:
                log.warning("going on without the log of pod %s: its Role lacks pods/log (get)", self.pod)
            self._lost = error.status in (403, 404)
            return False
        except (HTTPError, OSError) as error:
            log.debug("the log of %s broke off: %s", self.pod, error)
            return False
        return True

    def _follow(self) -> None:
        since_s = int(time.monotonic() - self._last_at) + _OVERLAP_S if self._last_stamp else None
        shown = self._last_stamp
        for line in self._cluster.log_lines(self.pod, since_s=since_s):
            stamp, _, text = line.partition(" ")
            if stamp <= shown:  # of one width, so they sort as text
                continue
            self._last_stamp, self._last_at = stamp, time.monotonic()
            log.info("| %s", text.rstrip())
