BEGIN TRANSACTION;
CREATE TABLE about (
	"key" TEXT NOT NULL, 
	value TEXT NOT NULL, 
	CONSTRAINT pk_about PRIMARY KEY ("key")
);
INSERT INTO "about" VALUES('network','local');
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('0013');
CREATE TABLE attempts (
	task_id TEXT NOT NULL, 
	attempt INTEGER NOT NULL, 
	node TEXT NOT NULL, 
	node_ip TEXT DEFAULT '' NOT NULL, 
	session BLOB NOT NULL, 
	signed_order BLOB NOT NULL, 
	began_at_ms BIGINT NOT NULL, 
	ended_at_ms BIGINT, 
	outcome TEXT DEFAULT '' NOT NULL, 
	reason TEXT DEFAULT '' NOT NULL, 
	status BIGINT DEFAULT '0' NOT NULL, 
	CONSTRAINT pk_attempts PRIMARY KEY (task_id, attempt), 
	CONSTRAINT fk_attempts_task_id FOREIGN KEY(task_id) REFERENCES tasks (task_id) ON DELETE CASCADE
)
 WITHOUT ROWID

;
INSERT INTO "attempts" VALUES('20260102_03_04_05_00000000000000000001',1,'0x2222222222222222222222222222222222222222','',X'7373737373737373737373737373737373737373737373737373737373737373',X'6F7264657220312F31',1700000000101,1700000000201,'complete','',200);
INSERT INTO "attempts" VALUES('20260102_03_04_05_00000000000000000002',1,'0x2222222222222222222222222222222222222222','',X'7373737373737373737373737373737373737373737373737373737373737373',X'6F7264657220322F31',1700000000102,NULL,'','',0);
CREATE TABLE bodies (
	task_id TEXT NOT NULL, 
	part TEXT NOT NULL, 
	size BIGINT NOT NULL, 
	content BLOB, 
	path TEXT DEFAULT '' NOT NULL, 
	CONSTRAINT pk_bodies PRIMARY KEY (task_id, part), 
	CONSTRAINT fk_bodies_task_id FOREIGN KEY(task_id) REFERENCES tasks (task_id) ON DELETE CASCADE
);
INSERT INTO "bodies" VALUES('20260102_03_04_05_00000000000000000001','request',2,X'7B7D','');
INSERT INTO "bodies" VALUES('20260102_03_04_05_00000000000000000001','response',11,X'7B226F6B223A747275657D','');
INSERT INTO "bodies" VALUES('20260102_03_04_05_00000000000000000002','request',2,X'7B7D','');
INSERT INTO "bodies" VALUES('20260102_03_04_05_00000000000000000003','request',2,X'7B7D','');
CREATE TABLE bootstraps (
	address TEXT NOT NULL, 
	lease_until_ms BIGINT NOT NULL, 
	started_at_ms BIGINT NOT NULL, 
	about TEXT DEFAULT '{}' NOT NULL, 
	CONSTRAINT pk_bootstraps PRIMARY KEY (address)
);
CREATE TABLE brc20_policies (
	workspace TEXT NOT NULL, 
	policy TEXT NOT NULL, 
	CONSTRAINT pk_brc20_policies PRIMARY KEY (workspace)
);
CREATE TABLE chain_faults (
	bootstrap TEXT NOT NULL, 
	node TEXT NOT NULL, 
	sequence BIGINT NOT NULL, 
	kind TEXT NOT NULL, 
	hash BLOB NOT NULL, 
	raw BLOB NOT NULL, 
	expected BLOB NOT NULL, 
	actual BLOB NOT NULL, 
	found_at_ms BIGINT NOT NULL, 
	CONSTRAINT pk_chain_faults PRIMARY KEY (bootstrap, node, sequence, kind, hash)
);
CREATE TABLE chains (
	bootstrap TEXT NOT NULL, 
	node TEXT NOT NULL, 
	head_sequence BIGINT NOT NULL, 
	head_hash BLOB NOT NULL, 
	CONSTRAINT pk_chains PRIMARY KEY (bootstrap, node)
);
INSERT INTO "chains" VALUES('0x1111111111111111111111111111111111111111','0x2222222222222222222222222222222222222222',1,X'2323232323232323232323232323232323232323232323232323232323232331');
CREATE TABLE challenges (
	number INTEGER NOT NULL, 
	bootstrap TEXT NOT NULL, 
	node TEXT NOT NULL, 
	gpu BLOB NOT NULL, 
	at_ms BIGINT NOT NULL, 
	model TEXT DEFAULT '' NOT NULL, 
	memory_bytes BIGINT DEFAULT '0' NOT NULL, 
	finding TEXT DEFAULT '' NOT NULL, 
	detail TEXT DEFAULT '' NOT NULL, 
	product_ms BIGINT DEFAULT '0' NOT NULL, 
	product_limit_ms BIGINT DEFAULT '0' NOT NULL, 
	chains_ms BIGINT DEFAULT '0' NOT NULL, 
	chains_limit_ms BIGINT DEFAULT '0' NOT NULL, 
	task_id TEXT DEFAULT '' NOT NULL, 
	CONSTRAINT pk_challenges PRIMARY KEY (number)
);
CREATE TABLE cloud_groups (
	id INTEGER NOT NULL, 
	user INTEGER NOT NULL, 
	name TEXT NOT NULL, 
	created_at_ms BIGINT NOT NULL, 
	CONSTRAINT pk_cloud_groups PRIMARY KEY (id), 
	CONSTRAINT fk_cloud_groups_user FOREIGN KEY(user) REFERENCES cloud_users (id) ON DELETE CASCADE
);
CREATE TABLE cloud_images (
	id INTEGER NOT NULL, 
	user INTEGER NOT NULL, 
	document TEXT NOT NULL, 
	created_at_ms BIGINT NOT NULL, 
	CONSTRAINT pk_cloud_images PRIMARY KEY (id), 
	CONSTRAINT fk_cloud_images_user FOREIGN KEY(user) REFERENCES cloud_users (id) ON DELETE CASCADE
);
CREATE TABLE cloud_products (
	id INTEGER NOT NULL, 
	document TEXT NOT NULL, 
	CONSTRAINT pk_cloud_products PRIMARY KEY (id)
);
CREATE TABLE cloud_sessions (
	hash BLOB NOT NULL, 
	user INTEGER NOT NULL, 
	expires_at_ms BIGINT NOT NULL, 
	CONSTRAINT pk_cloud_sessions PRIMARY KEY (hash), 
	CONSTRAINT fk_cloud_sessions_user FOREIGN KEY(user) REFERENCES cloud_users (id) ON DELETE CASCADE
);
CREATE TABLE cloud_users (
	id INTEGER NOT NULL, 
	email TEXT NOT NULL, 
	password TEXT NOT NULL, 
	created_at_ms BIGINT NOT NULL, 
	CONSTRAINT pk_cloud_users PRIMARY KEY (id), 
	CONSTRAINT uq_cloud_users_email UNIQUE (email)
);
CREATE TABLE cloud_workspaces (
	workspace TEXT NOT NULL, 
	user INTEGER NOT NULL, 
	document TEXT NOT NULL, 
	created_at_ms BIGINT NOT NULL, 
	CONSTRAINT pk_cloud_workspaces PRIMARY KEY (workspace), 
	CONSTRAINT fk_cloud_workspaces_user FOREIGN KEY(user) REFERENCES cloud_users (id) ON DELETE CASCADE
);
CREATE TABLE deployments (
	workspace TEXT NOT NULL, 
	node TEXT NOT NULL, 
	revision INTEGER NOT NULL, 
	assigned_at_ms BIGINT NOT NULL, 
	CONSTRAINT pk_deployments PRIMARY KEY (workspace, node), 
	CONSTRAINT fk_deployments_workspace FOREIGN KEY(workspace) REFERENCES workspaces (id)
);
CREATE TABLE job_calls (
	task_id TEXT NOT NULL, 
	job TEXT NOT NULL, 
	CONSTRAINT pk_job_calls PRIMARY KEY (task_id), 
	CONSTRAINT fk_job_calls_job FOREIGN KEY(job) REFERENCES tasks (task_id) ON DELETE CASCADE, 
	CONSTRAINT fk_job_calls_task_id FOREIGN KEY(task_id) REFERENCES tasks (task_id) ON DELETE CASCADE
);
CREATE TABLE jobs (
	task_id TEXT NOT NULL, 
	workspace TEXT NOT NULL, 
	caller TEXT NOT NULL, 
	name TEXT NOT NULL, 
	declared TEXT NOT NULL, 
	"key" TEXT DEFAULT '' NOT NULL, 
	node TEXT DEFAULT '' NOT NULL, 
	phase TEXT NOT NULL, 
	since_ms BIGINT NOT NULL, 
	state TEXT DEFAULT '' NOT NULL, 
	result TEXT DEFAULT '' NOT NULL, 
	CONSTRAINT pk_jobs PRIMARY KEY (task_id), 
	CONSTRAINT fk_jobs_task_id FOREIGN KEY(task_id) REFERENCES tasks (task_id) ON DELETE CASCADE
);
CREATE TABLE node_bindings (
	node TEXT NOT NULL, 
	wallet TEXT NOT NULL, 
	org_name TEXT DEFAULT '' NOT NULL, 
	sequence BIGINT NOT NULL, 
	signature BLOB NOT NULL, 
	bound_at_ms BIGINT NOT NULL, 
	CONSTRAINT pk_node_bindings PRIMARY KEY (node)
);
CREATE TABLE node_gpus (
	node TEXT NOT NULL, 
	gpu BLOB NOT NULL, 
	model TEXT NOT NULL, 
	seen_at_ms BIGINT NOT NULL, 
	CONSTRAINT pk_node_gpus PRIMARY KEY (node, gpu)
);
CREATE TABLE node_presence (
	bootstrap TEXT NOT NULL, 
	node TEXT NOT NULL, 
	CONSTRAINT pk_node_presence PRIMARY KEY (bootstrap, node)
);
CREATE TABLE node_standings (
	bootstrap TEXT NOT NULL, 
	node TEXT NOT NULL, 
	good FLOAT NOT NULL, 
	bad FLOAT NOT NULL, 
	at_ms BIGINT NOT NULL, 
	verified BIGINT DEFAULT '0' NOT NULL, 
	skewed BIGINT DEFAULT '0' NOT NULL, 
	disputed BIGINT DEFAULT '0' NOT NULL, 
	rules TEXT DEFAULT '{}' NOT NULL, 
	last_rule TEXT DEFAULT '' NOT NULL, 
	last_task TEXT DEFAULT '' NOT NULL, 
	last_disputed_at_ms BIGINT DEFAULT '0' NOT NULL, 
	CONSTRAINT pk_node_standings PRIMARY KEY (bootstrap, node)
);
CREATE TABLE nodes (
	address TEXT NOT NULL, 
	name TEXT DEFAULT '' NOT NULL, 
	peer_id TEXT DEFAULT '' NOT NULL, 
	software TEXT DEFAULT '' NOT NULL, 
	session BLOB NOT NULL, 
	first_seen_ms BIGINT NOT NULL, 
	last_seen_ms BIGINT NOT NULL, 
	CONSTRAINT pk_nodes PRIMARY KEY (address)
);
INSERT INTO "nodes" VALUES('0x2222222222222222222222222222222222222222','one','','',X'0000000000000000000000000000000000000000000000000000000000000000',100,100);
CREATE TABLE observations (
	bootstrap TEXT NOT NULL, 
	node TEXT NOT NULL, 
	receipt_hash BLOB NOT NULL, 
	task_id TEXT NOT NULL, 
	attempt INTEGER NOT NULL, 
	acknowledgement BLOB NOT NULL, 
	signed_observation BLOB NOT NULL, 
	CONSTRAINT pk_observations PRIMARY KEY (bootstrap, node, receipt_hash)
);
CREATE TABLE placements (
	task_id TEXT NOT NULL, 
	attempt INTEGER NOT NULL, 
	at_ms BIGINT NOT NULL, 
	document TEXT NOT NULL, 
	CONSTRAINT pk_placements PRIMARY KEY (task_id, attempt)
);
CREATE TABLE price_lists (
	bootstrap TEXT NOT NULL, 
	node TEXT NOT NULL, 
	session BLOB NOT NULL, 
	signed_list BLOB NOT NULL, 
	given_at_ms BIGINT NOT NULL, 
	CONSTRAINT pk_price_lists PRIMARY KEY (bootstrap, node, session)
);
CREATE TABLE receipts (
	bootstrap TEXT NOT NULL, 
	node TEXT NOT NULL, 
	sequence BIGINT NOT NULL, 
	task_id TEXT NOT NULL, 
	attempt INTEGER NOT NULL, 
	hash BLOB NOT NULL, 
	previous BLOB NOT NULL, 
	raw BLOB NOT NULL, 
	acknowledgement BLOB NOT NULL, 
	verdict TEXT DEFAULT '' NOT NULL, 
	rule TEXT DEFAULT '' NOT NULL, 
	expected TEXT DEFAULT '' NOT NULL, 
	actual TEXT DEFAULT '' NOT NULL, 
	outcome TEXT DEFAULT '' NOT NULL, 
	meter TEXT DEFAULT '' NOT NULL, 
	started_at_ms BIGINT DEFAULT '0' NOT NULL, 
	ended_at_ms BIGINT DEFAULT '0' NOT NULL, 
	duration_ms BIGINT DEFAULT '0' NOT NULL, 
	reserved_gpu_ms BIGINT DEFAULT '0' NOT NULL, 
	busy_gpu_ms BIGINT DEFAULT '0' NOT NULL, 
	received_at_ms BIGINT NOT NULL, signed_order BLOB, 
	CONSTRAINT pk_receipts PRIMARY KEY (bootstrap, node, sequence)
)
 WITHOUT ROWID

;
INSERT INTO "receipts" VALUES('0x1111111111111111111111111111111111111111','0x2222222222222222222222222222222222222222',1,'20260102_03_04_05_00000000000000000001',1,X'2323232323232323232323232323232323232323232323232323232323232331',X'0000000000000000000000000000000000000000000000000000000000000000',X'726563656970742031',X'61636B6E6F776C656467656D656E742031','verified','','','','complete','none',0,0,100,90,80,1700000000300,NULL);
INSERT INTO "receipts" VALUES('0x1111111111111111111111111111111111111111','0x2222222222222222222222222222222222222222',3,'20260102_03_04_05_00000000000000000003',1,X'2323232323232323232323232323232323232323232323232323232323232333',X'2323232323232323232323232323232323232323232323232323232323232332',X'726563656970742033',X'61636B6E6F776C656467656D656E742033','verified','','','','complete','none',0,0,100,90,80,1700000000300,NULL);
CREATE TABLE rechecks (
	number INTEGER NOT NULL, 
	bootstrap TEXT NOT NULL, 
	workspace TEXT NOT NULL, 
	revision INTEGER NOT NULL, 
	task_id TEXT NOT NULL, 
	at_ms BIGINT NOT NULL, 
	outcome TEXT DEFAULT '' NOT NULL, 
	first_node TEXT DEFAULT '' NOT NULL, 
	second_node TEXT DEFAULT '' NOT NULL, 
	third_node TEXT DEFAULT '' NOT NULL, 
	second_task TEXT DEFAULT '' NOT NULL, 
	third_task TEXT DEFAULT '' NOT NULL, 
	loser TEXT DEFAULT '' NOT NULL, 
	CONSTRAINT pk_rechecks PRIMARY KEY (number)
);
CREATE TABLE sticky_keys (
	"key" BLOB NOT NULL, 
	workspace TEXT NOT NULL, 
	node TEXT NOT NULL, 
	used_at_ms BIGINT NOT NULL, 
	CONSTRAINT pk_sticky_keys PRIMARY KEY ("key")
);
CREATE TABLE tasks (
	number INTEGER NOT NULL, 
	task_id TEXT NOT NULL, 
	workspace TEXT NOT NULL, 
	revision INTEGER NOT NULL, 
	api TEXT DEFAULT '' NOT NULL, 
	method TEXT DEFAULT '' NOT NULL, 
	port INTEGER NOT NULL, 
	target TEXT DEFAULT '' NOT NULL, 
	headers TEXT DEFAULT '[]' NOT NULL, 
	request_url TEXT DEFAULT '' NOT NULL, 
	token_label TEXT DEFAULT '' NOT NULL, 
	btc_address TEXT DEFAULT '' NOT NULL, 
	user_ip TEXT DEFAULT '' NOT NULL, 
	idempotency_key TEXT, 
	"detach" INTEGER NOT NULL, 
	wrapped INTEGER NOT NULL, 
	priority INTEGER NOT NULL, 
	accepted_at_ms BIGINT NOT NULL, 
	deadline_at_ms BIGINT NOT NULL, 
	state INTEGER NOT NULL, 
	attempts INTEGER NOT NULL, 
	node TEXT DEFAULT '' NOT NULL, 
	node_ip TEXT DEFAULT '' NOT NULL, 
	dispatched_at_ms BIGINT, 
	finished_at_ms BIGINT, 
	result_code BIGINT DEFAULT '0' NOT NULL, 
	message TEXT DEFAULT '' NOT NULL, 
	reason TEXT DEFAULT '' NOT NULL, 
	status BIGINT DEFAULT '0' NOT NULL, 
	content_type TEXT DEFAULT '' NOT NULL, 
	encoding TEXT DEFAULT '' NOT NULL, 
	verdict TEXT DEFAULT '' NOT NULL, 
	rule TEXT DEFAULT '' NOT NULL, bootstrap TEXT DEFAULT '' NOT NULL, cancel_asked_at_ms BIGINT, brc20 TEXT DEFAULT '' NOT NULL, caller TEXT DEFAULT '' NOT NULL, affinity TEXT DEFAULT '' NOT NULL, 
	CONSTRAINT pk_tasks PRIMARY KEY (number), 
	CONSTRAINT uq_tasks_task_id UNIQUE (task_id)
);
INSERT INTO "tasks" VALUES(1,'20260102_03_04_05_00000000000000000001','367614711220405248',1,'proxy','POST',8080,'/create?x=1','[]','','','','',NULL,0,0,0,1700000000001,1700000300000,3,1,'0x2222222222222222222222222222222222222222','',1700000000101,1700000000201,200,'','',200,'application/json','','verified','','0x1111111111111111111111111111111111111111',NULL,'','','');
INSERT INTO "tasks" VALUES(2,'20260102_03_04_05_00000000000000000002','367614711220405248',1,'proxy','POST',8080,'/create?x=1','[]','','','','',NULL,1,0,0,1700000000002,1700000300000,1,1,'0x2222222222222222222222222222222222222222','',1700000000102,NULL,0,'','',0,'','','','','0x1111111111111111111111111111111111111111',NULL,'','','');
INSERT INTO "tasks" VALUES(3,'20260102_03_04_05_00000000000000000003','367614711220405248',1,'proxy','POST',8080,'/create?x=1','[]','','','','','k',1,0,0,1700000000003,1700000300000,0,0,'','',NULL,NULL,0,'','',0,'','','','','0x1111111111111111111111111111111111111111',NULL,'','','');
CREATE TABLE webhooks (
	task_id TEXT NOT NULL, 
	url TEXT NOT NULL, 
	token_label TEXT DEFAULT '' NOT NULL, 
	tries INTEGER DEFAULT '0' NOT NULL, 
	next_at_ms BIGINT NOT NULL, 
	done_at_ms BIGINT, 
	status INTEGER DEFAULT '0' NOT NULL, 
	problem TEXT DEFAULT '' NOT NULL, 
	CONSTRAINT pk_webhooks PRIMARY KEY (task_id), 
	CONSTRAINT fk_webhooks_task_id FOREIGN KEY(task_id) REFERENCES tasks (task_id) ON DELETE CASCADE
);
CREATE TABLE workspace_revisions (
	workspace TEXT NOT NULL, 
	revision INTEGER NOT NULL, 
	spec TEXT NOT NULL, 
	created_at_ms BIGINT NOT NULL, 
	CONSTRAINT pk_workspace_revisions PRIMARY KEY (workspace, revision), 
	CONSTRAINT fk_workspace_revisions_workspace FOREIGN KEY(workspace) REFERENCES workspaces (id)
);
INSERT INTO "workspace_revisions" VALUES('367614711220405248',1,'{"image":"paint:1","ports":[8080]}',1700000000000);
INSERT INTO "workspace_revisions" VALUES('2',1,'{"image":"paint:1","ports":[8080]}',1700000000000);
CREATE TABLE workspace_rollouts (
	workspace TEXT NOT NULL, 
	base INTEGER NOT NULL, 
	target INTEGER NOT NULL, 
	began_at_ms BIGINT NOT NULL, 
	failed_at_ms BIGINT, 
	node TEXT DEFAULT '' NOT NULL, 
	reason TEXT DEFAULT '' NOT NULL, 
	detail TEXT DEFAULT '' NOT NULL, 
	CONSTRAINT pk_workspace_rollouts PRIMARY KEY (workspace), 
	CONSTRAINT fk_workspace_rollouts_workspace FOREIGN KEY(workspace) REFERENCES workspaces (id)
);
CREATE TABLE workspace_secret_boxes (
	workspace TEXT NOT NULL, 
	revision INTEGER NOT NULL, 
	bootstrap TEXT NOT NULL, 
	sealed BLOB NOT NULL, 
	CONSTRAINT pk_workspace_secret_boxes PRIMARY KEY (workspace, revision, bootstrap), 
	CONSTRAINT fk_workspace_secret_boxes_workspace FOREIGN KEY(workspace) REFERENCES workspaces (id)
);
CREATE TABLE workspace_secrets (
	workspace TEXT NOT NULL, 
	revision INTEGER NOT NULL, 
	sealed BLOB NOT NULL, 
	CONSTRAINT pk_workspace_secrets PRIMARY KEY (workspace, revision), 
	CONSTRAINT fk_workspace_secrets_workspace FOREIGN KEY(workspace) REFERENCES workspaces (id)
);
CREATE TABLE workspace_tokens (
	label TEXT NOT NULL, 
	workspace TEXT NOT NULL, 
	hash BLOB NOT NULL, 
	created_at_ms BIGINT NOT NULL, 
	expires_at_ms BIGINT, 
	CONSTRAINT pk_workspace_tokens PRIMARY KEY (label), 
	CONSTRAINT fk_workspace_tokens_workspace FOREIGN KEY(workspace) REFERENCES workspaces (id), 
	CONSTRAINT uq_workspace_tokens_hash UNIQUE (hash)
);
INSERT INTO "workspace_tokens" VALUES('367614711220405248.1','367614711220405248',X'6868686868686868686868686868333637363134373131323230343035323438',1700000000000,NULL);
CREATE TABLE workspaces (
	id TEXT NOT NULL, 
	owner TEXT DEFAULT '' NOT NULL, 
	name TEXT DEFAULT '' NOT NULL, 
	revision INTEGER NOT NULL, 
	created_at_ms BIGINT NOT NULL, 
	updated_at_ms BIGINT NOT NULL, 
	removed_at_ms BIGINT, 
	CONSTRAINT pk_workspaces PRIMARY KEY (id)
);
INSERT INTO "workspaces" VALUES('367614711220405248','','paint',1,1700000000000,1700000000000,NULL);
INSERT INTO "workspaces" VALUES('2','','paint',1,1700000000000,99,99);
CREATE INDEX ix_receipts_task ON receipts (task_id, attempt);
CREATE INDEX ix_tasks_listing ON tasks (workspace, accepted_at_ms, number);
CREATE INDEX ix_tasks_unfinished ON tasks (state) WHERE state < 3;
CREATE UNIQUE INDEX uq_tasks_idempotency_key ON tasks (workspace, idempotency_key) WHERE idempotency_key IS NOT NULL;
CREATE INDEX ix_workspace_tokens_workspace ON workspace_tokens (workspace);
CREATE INDEX ix_webhooks_due ON webhooks (next_at_ms) WHERE done_at_ms IS NULL;
CREATE INDEX ix_cloud_sessions_user ON cloud_sessions (user);
CREATE INDEX ix_cloud_images_user ON cloud_images (user);
CREATE INDEX ix_cloud_groups_user ON cloud_groups (user);
CREATE INDEX ix_cloud_workspaces_user ON cloud_workspaces (user);
CREATE INDEX ix_tasks_calls ON tasks (caller, accepted_at_ms, number) WHERE caller <> '';
CREATE INDEX ix_jobs_key ON jobs (caller, name, "key");
CREATE INDEX ix_job_calls_job ON job_calls (job);
CREATE INDEX ix_sticky_keys_workspace ON sticky_keys (workspace, used_at_ms);
CREATE INDEX ix_challenges_node ON challenges (node, number);
CREATE INDEX ix_tasks_of_node ON tasks (workspace, node, accepted_at_ms, number) WHERE node <> '';
CREATE INDEX ix_receipts_disputed ON receipts (node, sequence) WHERE verdict = 'disputed';
CREATE INDEX ix_placements_at_ms ON placements (at_ms);
CREATE INDEX ix_rechecks_workspace ON rechecks (workspace, number);
CREATE INDEX ix_rechecks_loser ON rechecks (loser, number) WHERE loser <> '';
COMMIT;
