"""A static dashboard of all runs below a folder: pages that open from disk, offline, made from records and arrays alone.

:func:`write_dashboard` writes it. Each other module makes the content of one page or of a part of one; ``templates/`` holds the pages,
``static/`` their style and scripts, ``vendor/`` the two libraries that they use, with their licences.
"""

from marginclip.reporting.dashboard.site import write_dashboard

__all__ = ["write_dashboard"]
