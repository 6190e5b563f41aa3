#include "options.h"

#include <ctype.h>
#include <limits.h>
#include <stdbool.h>
#include <stddef.h>
#include <string.h>

#define MINUTE 60L
#define HOUR (60 * MINUTE)
#define DAY (24 * HOUR)
#define MIN_INTERVAL 10L /* hpccr.coordinator.schedule.SHORTEST */
#define MAX_INTERVAL (365 * DAY)
#define MAX_KEEP 1000L

/* The number at *at, which moves behind its last digit; -1 if there is none or it has more than nine digits. */
static long read_number(const char **at)
{
	const char *start = *at;
	long number = 0;

	while (isdigit((unsigned char)**at)) {
		if (*at - start == 9)
			return -1;
		number = number * 10 + (*(*at)++ - '0');
	}
	return *at == start ? -1 : number;
}

/* Seconds of "HH:MM:SS" with `hours` read already and `at` at the first colon; -1 if it goes on otherwise. */
static long read_clock(long hours, const char *at)
{
	long minutes, seconds;

	at++;
	minutes = read_number(&at);
	if (minutes < 0 || minutes >= 60 || *at++ != ':')
		return -1;
	seconds = read_number(&at);
	if (seconds < 0 || seconds >= 60 || *at != '\0')
		return -1;
	return hours * HOUR + minutes * MINUTE + seconds;
}

static long read_interval(const char *text)
{
	const char *at = text;
	long number = read_number(&at);
	long unit;

	if (number < 0)
		return -1;
	if (*at == ':')
		return read_clock(number, at);
	switch (*at) {
	case '\0':
		return number * MINUTE;
	case 's':
		unit = 1;
		break;
	case 'm':
		unit = MINUTE;
		break;
	case 'h':
		unit = HOUR;
		break;
	case 'd':
		unit = DAY;
		break;
	default:
		return -1;
	}
	return at[1] == '\0' ? number * unit : -1;
}

static bool is_word(const char *text)
{
	return strcmp(text, "auto") == 0 || strcmp(text, "requeue") == 0 || strcmp(text, "none") == 0;
}

long interval_seconds(const char *text)
{
	long seconds = is_word(text) ? -1 : read_interval(text);

	return seconds >= MIN_INTERVAL && seconds <= MAX_INTERVAL ? seconds : -1;
}

static const char *interval_refusal(const char *text)
{
	long seconds;

	if (is_word(text))
		return NULL;
	seconds = read_interval(text);
	if (seconds < 0)
		return "is not an interval: give 30 (minutes), 90s, 30m, 2h, HH:MM:SS, auto, requeue or none";
	if (seconds < MIN_INTERVAL)
		return "is less than 10 s: the job would do little else (requeue: only when it has to leave its nodes)";
	if (seconds > MAX_INTERVAL)
		return "is longer than a year: give requeue for no periodic checkpoints";
	return NULL;
}

static const char *dir_refusal(const char *text)
{
	if (text[0] != '/' && strncmp(text, "~/", 2) != 0)
		return "is not an absolute path (or one that begins with ~/), and jobs run in other directories";
	if (strlen(text) >= PATH_MAX)
		return "is longer than a path can be";
	for (; *text != '\0'; text++) {
		if (iscntrl((unsigned char)*text))
			return "has control characters in it";
	}
	return NULL;
}

static const char *keep_refusal(const char *text)
{
	const char *at = text;
	long number = read_number(&at);

	if (number < 1 || number > MAX_KEEP || *at != '\0')
		return "is not a count of checkpoints from 1 to 1000";
	return NULL;
}

const char *option_refusal(enum option_kind kind, const char *text)
{
	if (text == NULL || text[0] == '\0')
		return "is empty";
	switch (kind) {
	case OPTION_INTERVAL:
		return interval_refusal(text);
	case OPTION_DIR:
		return dir_refusal(text);
	case OPTION_KEEP:
		return keep_refusal(text);
	case OPTION_KINDS:
		break;
	}
	return "is for no option";
}
