"""Pure problem -> solution functions; nothing here knows torch."""
