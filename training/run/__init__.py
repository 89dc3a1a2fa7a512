"""All that a long run needs and the mathematics does not: states, stopping, records, processes, memory."""
