/* What users may write behind --checkpoint, --checkpoint-dir and --checkpoint-keep. Pure: no Slurm, no I/O. */
#ifndef HPCCR_OPTIONS_H
#define HPCCR_OPTIONS_H

enum option_kind { OPTION_INTERVAL, OPTION_DIR, OPTION_KEEP, OPTION_KINDS };

/*
 * Why `text` cannot be a value of the option, as the end of a sentence; NULL if it can.
 *
 * INTERVAL: "30" (minutes), "90s", "30m", "2h", "1d", "HH:MM:SS", "auto", "requeue" or "none". DIR: an absolute path, or one
 * that begins with "~/". KEEP: a count from 1 to 1000.
 */
const char *option_refusal(enum option_kind kind, const char *text);

/* Seconds of a valid interval that is a time; -1 for "auto", "requeue", "none" and what is not valid. */
long interval_seconds(const char *text);

#endif
