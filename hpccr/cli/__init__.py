"""The hpccr command: one module per verb, imported only when its verb is called. Imported by nobody."""
