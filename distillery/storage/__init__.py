"""In: folders and small objects to keep, SQL work, names of work to lease.
Out: verified folders by digest, objects, a migrated database, leases, what nothing needs any more.
May import errors, settings, recipe and records.
"""
