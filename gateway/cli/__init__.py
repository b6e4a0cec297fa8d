"""The command line of the gateway: one file for each verb."""
