"""Rollouts that are asked for again, by their idempotency key."""

from __future__ import annotations

import asyncio
import hashlib
import time

from ead_server.errors import KeyReused, TooManyJobs
from ead_server.rollouts.job import Job


class KeptJobs:
    """Jobs by idempotency key, so that a call that is made again finds the work of the first.

    A job with a key goes on when its client is gone, since it will be asked for again; its groups
    are kept for `keep_s` seconds after the last one asked. Of at most `max_jobs` in `max_bytes`,
    then: without clients, nothing else bounds them.
    """

    def __init__(self, keep_s: float = 600.0, max_jobs: int = 64, max_bytes: int = 1 << 30) -> None:
        self.keep_s = keep_s
        self.max_jobs = max_jobs
        self.max_bytes = max_bytes
        self._jobs: dict[str, tuple[bytes, Job, float]] = {}  # by key, oldest first

    def find(self, key: str, body: bytes) -> Job | None:
        """The job that this request began before. Raises KeyReused; TooManyJobs when there is none
        and no room for it."""
        self._forget()
        if key not in self._jobs:
            running = [job for _, job, _ in self._jobs.values() if not job.done]
            if len(running) >= self.max_jobs:
                raise TooManyJobs(f"{self.max_jobs} jobs with an Idempotency-Key are running")
            if (size := sum(job.num_bytes for job in running)) >= self.max_bytes:
                raise TooManyJobs(f"running jobs with an Idempotency-Key take {size:,} bytes")
            return None
        fingerprint, job, _ = self._jobs.pop(key)
        self._jobs[key] = (fingerprint, job, time.monotonic())
        if fingerprint != hashlib.sha256(body).digest():
            raise KeyReused
        return job

    def keep(self, key: str, body: bytes, job: Job) -> None:
        self._jobs[key] = (hashlib.sha256(body).digest(), job, time.monotonic())
        self._forget()
        job.when_done(self._forget)  # older jobs make room for its answers
        asyncio.get_running_loop().call_later(self.keep_s + 1, self._forget)

    def _forget(self) -> None:
        now = time.monotonic()
        size = sum(job.num_bytes for _, job, _ in self._jobs.values())
        for key, (_, job, asked_at) in list(self._jobs.items()):
            too_many = len(self._jobs) > self.max_jobs or size > self.max_bytes
            if (too_many and job.done) or now - asked_at > self.keep_s:
                size -= job.num_bytes
                job.cancel()
                del self._jobs[key]
