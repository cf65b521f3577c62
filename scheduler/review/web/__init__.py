"""The review page: runs, jobs and attempts in a browser. It reads, and changes nothing."""
