def note_toggle(thread):
    pass


def uninstall():
    pass
