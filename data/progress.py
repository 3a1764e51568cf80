"""Progress bars, which are lines in a log file."""

import sys

from tqdm import tqdm

FIRST_LINE = 10  # seconds until the first line in a file
LONGEST_WAIT = 300  # seconds between two lines, at most
LINE = "{desc}: {n_fmt} of {total_fmt} in {elapsed}, {remaining} left"
LINE_WITHOUT_TOTAL = "{desc}: {n_fmt}{unit} in {elapsed}"


class ProgressBar(tqdm):
    """A tqdm bar in a terminal. In a file it prints a line after 10 seconds, then each time that
    the time has doubled, at least every 5 minutes, and one at the end. What takes less than 10
    seconds prints nothing there.

    hide: show nothing. Other arguments are tqdm's.
    """

    def __init__(self, *args, hide: bool = False, file=None, **options):
        file = file or sys.stderr
        self.prints_lines = not file.isatty()
        self.num_lines = 0
        self.next_line = FIRST_LINE  # seconds after the start
        if self.prints_lines:
            options |= {"delay": FIRST_LINE, "mininterval": FIRST_LINE / 10, "miniters": 0}
        super().__init__(*args, file=file, disable=hide, **options)

    def display(self, msg=None, pos=None):
        """tqdm calls this when it is time to show the bar."""
        if not self.prints_lines:
            return super().display(msg, pos)
        elapsed = self.format_dict["elapsed"]
        if elapsed >= self.next_line:
            self.print_line()
            self.next_line = elapsed + min(elapsed, LONGEST_WAIT)
        return True

    def print_line(self):
        self.bar_format = LINE if self.total else LINE_WITHOUT_TOTAL
        self.num_lines += 1
        self.fp.write(str(self).strip() + "\n")
        self.fp.flush()

    def close(self):
        if self.prints_lines and not self.disable:
            if self.num_lines:
                self.print_line()
            self.sp = None  # there is no bar to clear
        super().close()
