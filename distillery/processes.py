"""Child processes that never outlive their parent."""

import os
import threading
import time


def end_with(parent: int) -> None:
    """Has this process end within half a second of its no longer being the child of the process id `parent`, however
    that ended and whatever is under way here. Call it first of all."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
