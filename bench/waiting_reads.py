"""`python -m bench.waiting_reads FILE N`: N threads that each read a page of a file, far from one another, and
wait. Rule: it waits until it is killed, whatever the reads come to.
"""

from __future__ import annotations

import mmap
import os
import sys
import threading


def main(path: str, reads: int) -> None:
    file = os.open(path, os.O_RDONLY | os.O_DIRECT)
    apart = os.fstat(file).st_size // reads // mmap.PAGESIZE * mmap.PAGESIZE

    def read(number: int) -> None:
        try:
            os.preadv(file, [mmap.mmap(-1, mmap.PAGESIZE)], number * apart)
        except OSError:
            pass

    threading.stack_size(128 << 10)
    threads = [threading.Thread(target=read, args=(number,)) for number in range(reads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    threading.Event().wait()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
