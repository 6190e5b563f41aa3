/* Run by `make check`: prints what is wrong and fails, or says nothing. */
#include "options.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int failures;

static void expect_seconds(const char *text, long expected)
{
	long found = interval_seconds(text);
	const char *refusal = option_refusal(OPTION_INTERVAL, text);

	if (found == expected && refusal == NULL)
		return;
	printf("%s: %ld seconds, expected %ld; %s\n", text, found, expected, refusal ? refusal : "accepted");
	failures++;
}

static void expect_refused(enum option_kind kind, const char *text)
{
	if (option_refusal(kind, text) != NULL && (kind != OPTION_INTERVAL || text == NULL || interval_seconds(text) < 0))
		return;
	printf("%s: accepted for option %d\n", text ? text : "NULL", (int)kind);
	failures++;
}

static void expect_accepted(enum option_kind kind, const char *text)
{
	const char *refusal = option_refusal(kind, text);

	if (refusal == NULL)
		return;
	printf("%s: refused for option %d: it %s\n", text, (int)kind, refusal);
	failures++;
}

int main(void)
{
	static const char *const no_intervals[] = {
		"",	  "0",	      "9s",	   "00:00:09", "-5",	"+5",	     " 5",	   "5 ",	 "1.5h",
		"30M",	  "30min",    "1h30m",	   "1:30",     "1:60:00", "1:00:60",  "1:00:00:00", ":30:00",	 "1::00",
		"AUTO",	  "never",    "autos",	   "s",	       "9999999999", "999999999d", "366d",	   "1:2:",	 "1:2:3s",
	};
	static const char *const no_dirs[] = { "", "relative/path", "~other/x", "~", "./x", "/with\nnewline" };
	static const char *const no_counts[] = { "", "0", "-1", "1001", "2x", "two", "1 ", "9999999999" };
	char *too_long = malloc(PATH_MAX + 1);

	expect_seconds("30", 1800);
	expect_seconds("90s", 90);
	expect_seconds("30m", 1800);
	expect_seconds("2h", 7200);
	expect_seconds("1d", 86400);
	expect_seconds("365d", 365 * 86400L);
	expect_seconds("01:30:05", 5405);
	expect_seconds("0:0:10", 10);
	expect_seconds("100:00:00", 360000);
	expect_seconds("auto", -1);
	expect_seconds("requeue", -1);
	expect_seconds("none", -1);
	for (size_t i = 0; i < sizeof(no_intervals) / sizeof(*no_intervals); i++)
		expect_refused(OPTION_INTERVAL, no_intervals[i]);
	expect_refused(OPTION_INTERVAL, NULL);

	expect_accepted(OPTION_DIR, "/scratch/user/ckpt");
	expect_accepted(OPTION_DIR, "~/ckpt with a space");
	for (size_t i = 0; i < sizeof(no_dirs) / sizeof(*no_dirs); i++)
		expect_refused(OPTION_DIR, no_dirs[i]);
	if (too_long == NULL)
		return 1;
	memset(too_long, '/', PATH_MAX);
	too_long[PATH_MAX] = '\0';
	expect_refused(OPTION_DIR, too_long);
	free(too_long);

	expect_accepted(OPTION_KEEP, "1");
	expect_accepted(OPTION_KEEP, "1000");
	for (size_t i = 0; i < sizeof(no_counts) / sizeof(*no_counts); i++)
		expect_refused(OPTION_KEEP, no_counts[i]);
	return failures ? 1 : 0;
}
