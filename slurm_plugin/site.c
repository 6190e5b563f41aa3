#include "plugin.h"

#include <string.h>

#ifndef HPCCR_PATH
#define HPCCR_PATH "/usr/bin/hpccr"
#endif

static const char *value_of(const char *argument, const char *key)
{
	size_t length = strlen(key);

	return strncmp(argument, key, length) == 0 && argument[length] == '=' ? argument + length + 1 : NULL;
}

struct site site_read(int argc, char **argv)
{
	struct site site = { .hpccr = HPCCR_PATH, .interval = "auto" };
	const char *value, *refusal;

	for (int i = 0; i < argc; i++) {
		if ((value = value_of(argv[i], "hpccr")) != NULL) {
			if (value[0] == '/')
				site.hpccr = value;
			else
				slurm_error("hpccr: %s in plugstack.conf: must be an absolute path", argv[i]);
		} else if ((value = value_of(argv[i], "interval")) != NULL) {
			refusal = option_refusal(OPTION_INTERVAL, value);
			if (refusal == NULL && strcmp(value, "none") == 0)
				refusal = "is for jobs that want no checkpoints, and these do";
			if (refusal == NULL)
				site.interval = value;
			else
				slurm_error("hpccr: %s in plugstack.conf: \"%s\" %s", argv[i], value, refusal);
		} else {
			slurm_error("hpccr: %s in plugstack.conf: there are hpccr=PATH and interval=TIME", argv[i]);
		}
	}
	return site;
}
