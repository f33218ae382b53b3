"""What each weight is while a model is attached: resident, away, or in use; no decisions on
placement.
"""
