"""What of a run can be explored on its page: windows, edits and maps, from tables and pictures."""
