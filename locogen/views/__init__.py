"""What people look at: tables, plots, widgets."""
