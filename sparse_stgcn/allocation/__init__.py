"""Which layer keeps how many weights under a budget: costs, a latency table, sensitivities, rules, and the front of all."""
