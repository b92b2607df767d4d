"""All that people see: terminal, tables, the HTML page, pictures, commands to run again. No torch."""
